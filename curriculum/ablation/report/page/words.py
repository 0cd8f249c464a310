"""What the page and the Markdown say around the numbers: titles, leads, keys and the method."""

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
    "spread": "How far random orders lie apart",
    "cost": "What a better order costs",
    "calibration": "What contextual calibration changes",
    "labels": "Which labels are predicted",
}
LEADS = {
    "forest": (
        "Every orderer against the mean over the random orders of the same demonstration sets, item by item. Where "
        "several tasks were run, the panels of all tasks come first: there a difference is the mean over tasks, and "
        "the sample is the sets of all tasks."
    ),
    "spread": (
        "One row for every demonstration set, sorted by its mean. Grey: each of its random orders. Below them, where "
        "every orderer stands under that set. At the top, the means over sets, and the mean of the worst and of the "
        "best orders."
    ),
    "cost": (
        "Gain over the mean random order against the tokens that the model reads for one answer, with the choosing of"
        " the order shared out over the test items. The line joins the orderers that nothing cheaper matches; their "
        "intervals are shown."
    ),
    "calibration": (
        "Accuracy of every orderer without and with contextual calibration (arXiv 2102.09690), on the demonstration "
        "sets that were run both ways."
    ),
    "labels": (
        "Share of each label among the predictions, against the gold labels (dashed). On the right the entropy of "
        "these shares, 1 when all labels come equally often: one dot an order for the random ones, one a set for the "
        "others, and their mean."
    ),
}
KEYS: dict[str, list[tuple[str, str]]] = {
    "forest": [
        ("helps", "helps"),
        ("hurts", "hurts"),
        ("dot", "shows nothing, after Holm’s correction"),
        ("thick", "95 % interval"),
        ("thin", "corrected for the number of orderers"),
        ("bandbox", "too small to be seen in four studies of five"),
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
        ("thin", "best for the cost"),
    ],
    "calibration": [
        ("dot", "without"),
        ("dot fill", "with"),
        ("helps", "raised"),
        ("hurts", "lowered, after Holm’s correction"),
        ("grey", "one standard deviation over random orders"),
    ],
    "labels": [("dashes", "gold")],
}
TABLE_LEAD = (
    "Accuracies in per cent, differences in points. Percentile: mean place among the random orders of the same set. "
    "Needed: how many sets, or items a set, would find the difference seen with 80 % power after the correction; – "
    "where no number would."
)
METHOD = [
    (
        "Difference",
        "For demonstration set s and test item q, whether the orderer was right minus the share of the random orders "
        "of s that were right on q; averaged over items, then over sets. An orderer is never compared with one random"
        " order.",
    ),
    (
        "Interval and p",
        "Demonstration sets are the sample, so each is one observation however many items it was asked: wild cluster "
        "bootstrap over sets, inverted, so that test and interval agree; Student’s t where there are too few sets for"
        " it. They speak of other sets like these, asked these same items.",
    ),
    (
        "Holm’s correction",
        "Within one panel, over all orderers but the oracles. The thin line is the interval at level 1 − 0.05/m for m"
        " orderers, which is a little wider than Holm’s procedure needs, so a filled mark may touch zero with it.",
    ),
    (
        "All tasks",
        "A cluster is one demonstration set of one task; with several k, its differences are averaged first. Sets are"
        " weighted so that every task counts alike. Tasks are not a sample: the interval speaks of other sets on "
        "these tasks.",
    ),
    (
        "Too small to be seen",
        "The smallest true difference that a study with as many sets, as varied as these, finds with 80 % power after"
        " the correction: median over the orderers of the panel.",
    ),
    (
        "Oracles",
        "The best and the worst of the random orders, picked by the test labels: the height of the ceiling, not a "
        "method. They beat the mean even where order means nothing, so they are not tested.",
    ),
    (
        "Cost",
        "Tokens that the model reads for one answer, prefixes shared by many queries counted once, and the tokens "
        "read to choose the order divided by the number of test items. Fewer items make choosing dearer.",
    ),
]
