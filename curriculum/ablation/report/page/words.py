"""The fixed texts of a report as an HTML page and as Markdown: titles, introductions, legends and the method."""

from __future__ import annotations

SHORT = {
    "forest": "Differences",
    "spread": "Spread",
    "cost": "Cost",
    "calibration": "Calibration",
    "labels": "Labels",
}
TITLES = {
    "forest": "Does an orderer beat a random order?",
    "spread": "How much random orders differ",
    "cost": "What a better order costs",
    "calibration": "What contextual calibration changes",
    "labels": "Which labels are predicted",
}
LEADS = {
    "forest": (
        "Each orderer compared with the mean over the random orders of the same demonstration sets, item by item. If "
        "several tasks were run, the panels over all tasks come first: there, a difference is the mean over tasks, "
        "and the sample is the sets of all tasks."
    ),
    "spread": (
        "One row for each demonstration set, sorted by mean accuracy. Grey: the random orders of the set. Below them: "
        "each orderer on that set. The top row shows the means over sets, and its grey line reaches from the mean of "
        "the worst orders to the mean of the best."
    ),
    "cost": (
        "Gain over the mean random order against the tokens that the model reads for one answer. The tokens read to "
        "choose an order are divided among the test items. The line joins the orderers that no cheaper orderer "
        "matches; their intervals are shown."
    ),
    "calibration": (
        "Accuracy of each orderer without and with contextual calibration (arXiv 2102.09690), on the demonstration "
        "sets that were run both ways."
    ),
    "labels": (
        "Share of each label among the predictions, compared with the gold labels (dashed). On the right: the entropy "
        "of these shares, which is 1 if all labels are equally frequent. Dots show each random order, and each set "
        "for the other orderers; bars show their means."
    ),
}
# The legend of each section: (CSS class of the swatch, text) for each of its entries.
KEYS: dict[str, list[tuple[str, str]]] = {
    "forest": [
        ("helps", "helps"),
        ("hurts", "hurts"),
        ("dot", "no significant difference after Holm’s correction"),
        ("thick", "95 % interval"),
        ("thin", "interval corrected for the number of orderers"),
        ("bandbox", "too small to detect with 80 % power"),
    ],
    "spread": [
        ("random", "random orders"),
        ("mean", "their mean"),
        ("named", "orderers that are rules"),
        ("chosen", "orderers chosen with the model"),
    ],
    "cost": [
        ("named", "orderers that are rules"),
        ("chosen", "orderers chosen with the model"),
        ("thin", "best at its cost"),
    ],
    "calibration": [
        ("dot", "without"),
        ("dot fill", "with"),
        ("helps", "significantly higher"),
        ("hurts", "significantly lower, after Holm’s correction"),
        ("grey", "one standard deviation over random orders"),
    ],
    "labels": [("dashes", "gold labels")],
}
TABLE_LEAD = (
    "Accuracies are in per cent, differences in points. Percentile: mean rank among the random orders of the same "
    "set. Needed: the number of sets, or of items per set, with which the observed difference would be detected with "
    "80 % power after the correction; – if no number suffices."
)
METHOD = [
    (
        "Difference",
        "For each demonstration set s and test item q: whether the orderer’s answer was right, minus the share of the "
        "random orders of s whose answer to q was right. This is averaged over items, then over sets. An orderer is "
        "never compared with a single random order.",
    ),
    (
        "Interval and p",
        "The sample consists of demonstration sets, so each set is one observation, however many items it has. The "
        "test is a wild cluster bootstrap over sets, and the interval is its inversion, so the two agree; with too "
        "few sets for it, both use Student’s t. The results apply to other sets like these with the same items.",
    ),
    (
        "Holm’s correction",
        "Applied within one panel, over all orderers except the oracles. The thin line is the interval at level 1 − "
        "0.05/m for m orderers. It is slightly wider than Holm’s procedure requires, so the thin line of a filled "
        "mark may touch zero.",
    ),
    (
        "All tasks",
        "A cluster is one demonstration set of one task; if a set was run with several k, its differences are "
        "averaged first. Sets are weighted so that every task counts equally. Tasks are not a sample: the interval "
        "generalises to other sets of these tasks.",
    ),
    (
        "Too small to detect",
        "The smallest true difference that a study with this many sets, which vary as much as these, detects with "
        "80 % power after the correction: the median over the orderers of the panel.",
    ),
    (
        "Oracles",
        "The best and the worst of the random orders by the test labels: a bound, not a method. They differ from the "
        "mean even if order has no effect, so they are not tested.",
    ),
    (
        "Cost",
        "The tokens that the model reads for one answer, where a prefix that several queries share counts once, plus "
        "the tokens read to choose the order, divided by the number of test items. With fewer items, choosing is more "
        "expensive per answer.",
    ),
]
