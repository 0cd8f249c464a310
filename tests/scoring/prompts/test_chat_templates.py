"""A chat template gives the text of transformers, or an error that names the model; it cannot take the machine's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sparsort
from sparsort.curriculum.ablation.recipe.ablation import Ablation
from sparsort.curriculum.ablation.run.model import Engine
from sparsort.curriculum.demos.prompt import build_prompt
from sparsort.errors import SparsortError
from sparsort.recipes.train.text import TrainText
from sparsort.scoring.calibration.calibration import CalibratedScorer, Calibration
from sparsort.scoring.loading.demo_model import load_tokenizer
from sparsort.scoring.loading.load import load_model
from sparsort.scoring.prompts import metered_templates
from sparsort.scoring.prompts.chat_templates import RefusedTurnsError, apply_chat_template, need_chat_template
from sparsort.scoring.prompts.prompt import Prompt, hash_tokenizer, identify_tokenizer
from sparsort.scoring.scorers.candidates import CandidateScorer

TURNS = [("system", "Be kind."), ("user", "My  bike é broke.\n"), ("assistant", "Walk </think> on\u00a0foot!")]
ROWS = [{"id": str(n), "text": f"word {n}"} for n in range(3)]

# Everything that templates of real models do: loops, macros, namespaces, filters, methods, tests, call blocks, `~`, `generation`.
TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "{%- macro turn(m, first=false) -%}<{{ m.role ~ '|' ~ m.content.split('</think>')[-1].lstrip('\\n') }}>{%- endmacro -%}"
    "{% set ns = namespace(last=none, all='') %}{% for m in messages[::-1] if m.role != 'system' %}"
    "{% set ns.all = ns.all + turn(m, first=loop.first) %}{% set ns.last = loop.index0 %}{% endfor %}{{ ns.all }}{{ ns.last }}",
    "{{ messages | tojson(indent=2) }}{{ messages | map(attribute='role') | join(', ') }}{{ '%s-%05d' % ('a', 7) }}"
    "{{ 'x' * 3 ~ [1, 2] ~ 2 ** 5 }}{{ 5 % 900000000 }}"
    "{{ '{:>5}|{}'.format('a', messages | length) }}{{ eos_token is defined }}",
    "{% for m in messages %}{% if loop.first and tools is none %}{{ m.content | replace('e', 'EE') | indent(2) }}{% continue %}"
    "{% endif %}{% generation %}{{ m.content.replace('w', 'ww').center(30) }}{% endgeneration %}{% break %}{% endfor %}",
    "{% set text %}{% for m in messages %}{{ loop.cycle('a', 'b') }}{{ m.content }}{% else %}none{% endfor %}{% endset %}"
    "{% macro wrap() %}<{{ caller('y') }}>{% endmacro %}{% call(x) wrap() %}{{ x }}{% endcall %}{{ text | list | length }}",
]

BROKEN = [
    "{{ raise_exception('roles must alternate') }}",
    "{{ messages[7].content }}",
    "{{ messages[0].content.no_such() }}",
    "{{ 1 / 0 }}",
    "{{ messages | no_such_filter }}",
    "{% for m in messages %}",
    "{{ [].__class__.__mro__ }}",
    "{% include 'other' %}",
    "{{ 10 ** 5000 }}",
    "{{ [3, 'a'] | sort }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
]

# Each of these takes gigabytes or hours, or writes without end, where nothing is counted.
TOO_MUCH = [
    "{{ 'x' * 3000000000 }}",
    "{{ 3000000000 * 'x' }}",
    "{{ [1] * 10 ** 9 }}",
    "{{ 7 ** 10000000000 }}",
    "{% set ns = namespace(n=7) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{% for i in range(100000) %}{{ 'x' * 100000 }}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% set x %}{% for i in range(100000) %}{% for j in range(100000) %}abc{% endfor %}{% endfor %}{% endset %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s.replace('x', 'xx') %}{% endfor %}",
    "{{ 'x'.center(10 ** 10) }}",
    "{{ 'x' | center(10 ** 10) }}",
    "{{ 'x' | indent(width=10 ** 10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10 ** 10, 1) }}",
    "{{ '{:10000000000}'.format('x') }}",
    "{{ '{:{}}'.format('x', 10 ** 10) }}",
    "{{ '%10000000000s' | format('x') }}",
    "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
    "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}",
    "{{ ('y' * 100000).join('x' * 100000) }}",
    "{{ ('x' * 100000) | join('y' * 100000) }}",
    "{{ (['y' * 100000] * 100000) | join }}",
    "{{ lipsum(10 ** 10) }}",
    "{{ 'x'.ljust(10 ** 10) }}",
    "{{ 'x'.zfill(10 ** 10) }}",
    "{{ '\t'.expandtabs(10 ** 10) }}",
    "{{ (7).to_bytes(10 ** 10, 'big') }}",
    "{{ messages | batch(10 ** 10, 'x') | list }}",
    "{{ messages | slice(10 ** 10) | list }}",
    "{{ messages | tojson(indent=10 ** 10) }}",
    "{{ 1.5 | round(10 ** 10, 'floor') }}",
    "{{ ['x'] | map('center', 10 ** 10) | list }}",
    "{{ '%(a)10000000000d' % {'a': 1} }}",
    "{{ '%.*f' % (10 ** 10, 1) }}",
    "{{ '{:{}}'.format('x', '10000000000') }}",
    "{{ '{0[}]:{1}}'.format({'}': 'x'}, 10 ** 10) }}",
    "{{ '{:10000000000}{'.format('x') }}",
    "{{ '{:\uff11\uff10000000000}'.format('x') }}",
    "{{ '{:1000000{}}'.format('x', '0000') }}",
    "{{ '%00000000000000000000000000000010000000000d' % 1 }}",
    "{{ '{x:{n[0]}}'.format(x='x', n=[10 ** 10]) }}",
]

# A number that is no size, in every place where a template may pass one.
LARGE_NUMBERS = [
    "{% macro f(t) %}{{ t }}{% endmacro %}{{ f(1735689600) }}{{ f(t=1735689600) }}",
    "{% macro center(t) %}{{ t }}{% endmacro %}{{ center(1735689600) }}",
    "{% macro w() %}{{ caller(1735689600) }}{% endmacro %}{% call(t) w() %}{{ t }}{% endcall %}",
    "{{ x | default(1735689600) }}{{ '12' | int(4294967295) }}{{ 'a' | float(4294967295) }}",
    "{% set ns = namespace(seed=4294967295) %}{{ ns.seed }}{{ dict(a=4294967295).a }}{{ {'a': 1}.get('b', 1735689600) }}",
    "{{ cycler(1735689600, 2).next() }}{{ [1735689600] | sum(start=4294967295) }}{{ range(1735689600, 1735689602) | list }}",
    "{{ messages[0].content | truncate(1735689600) }}{{ messages[0].content | wordwrap(1735689600) }}",
    "{{ 'a'.replace('a', 'b', 1735689600) }}{{ 'a b'.split(' ', 1735689600) }}{{ 'abc'.find('c', 0, 1735689600) }}",
    "{{ '%s' % 1735689600 }}{{ '%d' | format(1735689600) }}",
    "{{ 'id 1735689600: * %s' % 1735689600 }}{{ '%(a)d' % {'a': 1735689600} }}",
    "{{ '{}'.format(1735689600) }}{{ '1735689600 {a:>5}'.format(a=1735689600) }}{{ '{{{}}}'.format(1735689600) }}",
    "{{ '{:{}}'.format('x', 5) }}{{ 1735689600 | round }}{{ 1735689600 % 1735689599 }}{{ 1735689600 + 4294967295 }}",
    "{{ [1735689600] | join(',') }}{{ [4294967295] | map('string') | list }}{{ 1735689600 | tojson }}",
    "{{ 1735689600 is divisibleby 4294967295 }}",
]


@pytest.fixture
def tokenizer(make_tiny_model: Callable[..., Path]) -> Any:
    return load_tokenizer(str(make_tiny_model("llama")))


@pytest.mark.parametrize("template", TEMPLATES + LARGE_NUMBERS)
@pytest.mark.parametrize("ask", [True, False])
def test_the_text_is_that_of_transformers(tokenizer: Any, template: str, ask: bool) -> None:
    # A template that ignores the turns is refused.
    tokenizer.chat_template = template + "{{ messages[-1].content }}"
    messages = [{"role": role, "content": content} for role, content in TURNS]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    assert apply_chat_template(tokenizer, TURNS, ask=ask) == expected
    assert metered_templates.can_meter(tokenizer)


@pytest.mark.parametrize("template", BROKEN)
def test_whatever_a_template_raises_is_one_error_that_names_the_model(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(
        SparsortError, match=r"the chat template of the model '.*llama.*'.*[Uu]se a plain prompt"
    ) as caught:
        apply_chat_template(tokenizer, TURNS)
    assert len(str(caught.value)) < 1000
    # A template that cannot be compiled reads no row at all; any other may refuse one row and read the next.
    assert isinstance(caught.value, RefusedTurnsError) == ("cannot be read" not in str(caught.value))


@pytest.mark.parametrize("template", TOO_MUCH)
def test_a_template_cannot_take_the_memory_or_write_without_end(
    tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Less than the product's limit, which loops need seconds to reach.
    monkeypatch.setattr(metered_templates, "WORK", 2**21)
    tokenizer.chat_template = template
    with pytest.raises(RefusedTurnsError, match=r"refuses the turns user: it (builds|writes|repeats)"):
        apply_chat_template(tokenizer, [("user", "x")])


def test_the_limits_grow_with_the_turns(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metered_templates, "WORK", 1000)
    monkeypatch.setattr(metered_templates, "OUTPUT", 100)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    long = "word " * 100_000
    assert apply_chat_template(tokenizer, [("user", long)]) == long
    tokenizer.chat_template = "{% for m in messages %}" + "{{ m.content }}" * 17 + "{% endfor %}"
    with pytest.raises(RefusedTurnsError, match="it writes more than 8,000,"):
        apply_chat_template(tokenizer, [("user", long)])
    # What Jinja's optimiser could compute beforehand is counted like the rest.
    tokenizer.chat_template = "{{ 'abc' | upper }}" * 400
    with pytest.raises(RefusedTurnsError, match=r"it (repeats|writes)"):
        apply_chat_template(tokenizer, [("user", "x")])


def test_a_tokenizer_with_its_own_templates() -> None:
    class Own:
        chat_template = "own"
        name_or_path = "models/own"
        text = "[INST] {} [/INST]"

        def apply_chat_template(self, messages: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
            if not self.text:
                raise KeyError("role")
            return self.text.replace("{}", messages[0]["content"])

    own = Own()
    assert not metered_templates.can_meter(own)
    assert apply_chat_template(own, [("user", "x")]) == "[INST] x [/INST]"
    own.text = "x" * (metered_templates.OUTPUT + 1000)
    with pytest.raises(RefusedTurnsError, match="'models/own' refuses the turns user: it writes more than"):
        apply_chat_template(own, [("user", "x")])
    own.text = ""
    with pytest.raises(RefusedTurnsError, match="'models/own' refuses the turns user: KeyError: 'role'"):
        apply_chat_template(own, [("user", "x")])


def test_a_tokenizer_with_several_templates(tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tools": "other"}
    assert apply_chat_template(tokenizer, [("user", "x")]) == "x"
    tokenizer.chat_template = {"tools": "other"}
    with pytest.raises(SparsortError, match="cannot be read: ValueError"):
        apply_chat_template(tokenizer, [("user", "x")])


@pytest.mark.parametrize("template", ["{{ 'x' * 3000000000 }}", "{{ raise_exception('no') }}", "{% for %}"])
def test_nothing_is_rendered_without_chat(make_tiny_model: Callable[..., Path], template: str, tmp_path: Path) -> None:
    small = load_model(str(make_tiny_model("llama")), dtype="float32")
    small.tokenizer.chat_template = template
    scorer = sparsort.SparsityScorer(small)
    scores = scorer.score(ROWS, "{text}")
    assert list(scores.column("status")) == ["ok"] * 3
    with pytest.raises(SparsortError, match="chat template"):
        scorer.score(ROWS, "{text}", chat=True)
    text = build_prompt(
        ROWS, {"text": "word 9"}, prompt="{text}", answer=" {id}", max_tokens=900, tokenizer=small.tokenizer
    )
    assert text.endswith("word 9")


def test_every_rendering_is_this_one(make_tiny_model: Callable[..., Path]) -> None:
    """Prompts, conversations, demonstrations and training texts refuse a template alike."""
    small = load_model(str(make_tiny_model("llama")), dtype="float32")
    small.tokenizer.chat_template = "{{ 1 / 0 }}"
    reason = "ZeroDivisionError: division by zero"
    row = {
        "text": "a",
        "label": "b",
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    }
    with pytest.raises(SparsortError, match=reason):
        Prompt.of("{text}", chat=True).render(row, where="row 0", tokenizer=small.tokenizer)
    problem = Prompt.of_messages("messages").render(row, where="row 0", tokenizer=small.tokenizer).problem
    assert problem is not None
    assert reason in problem[1]
    with pytest.raises(SparsortError, match=rf"row 0: .*{reason}"):
        TrainText(messages="messages").of(row, small.tokenizer, where="row 0")
    with pytest.raises(SparsortError, match=reason):
        build_prompt(ROWS, {"text": "a"}, prompt="{text}", answer="{id}", chat=True, tokenizer=small.tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "Hello.",
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{% endfor %}",
        "{{ messages | length }}",
        "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}",
    ],
)
def test_a_template_that_ignores_the_turns_is_refused(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    message = r"the model '.*llama.*' gives the same text for different turns, so all rows would have the same score\. Correct it"
    for _ in range(2):  # what was found once is found again
        with pytest.raises(SparsortError, match=message):
            need_chat_template(tokenizer)
        with pytest.raises(SparsortError, match=message):
            Prompt.of("{text}", chat=True).render(ROWS[0], where="row 0", tokenizer=tokenizer)
    with pytest.raises(SparsortError, match=r"different turns.* Pass"):
        need_chat_template(tokenizer, step="Pass something else.")


def test_a_template_that_refuses_a_single_question_is_not_taken_for_one_that_ignores_it(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert "My  bike é broke." in apply_chat_template(tokenizer, TURNS)
    with pytest.raises(RefusedTurnsError, match="system first"):
        apply_chat_template(tokenizer, TURNS[1:])


def test_the_identity_of_a_tokenizer_holds_the_template_only_where_it_is_used(tokenizer: Any) -> None:
    plain, chat = hash_tokenizer(tokenizer), hash_tokenizer(tokenizer, chat=True)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    assert plain == hash_tokenizer(tokenizer) == hash_tokenizer(tokenizer, chat=True)
    tokenizer.chat_template = template
    assert chat != plain
    assert identify_tokenizer(tokenizer, chat=False) == plain
    assert identify_tokenizer(tokenizer, chat=True) == chat
    # Version 0.1.0 recorded the template for plain prompts too.
    assert identify_tokenizer(tokenizer, chat=False, recorded=chat) == chat
    assert identify_tokenizer(tokenizer, chat=False, recorded="sha256:0") == plain
    tokenizer.chat_template = template + " "
    assert identify_tokenizer(tokenizer, chat=False, recorded=chat) == plain
    tokenizer.chat_template = "{{ 1 / 0 }}"
    assert identify_tokenizer(tokenizer, chat=False, recorded=chat) == plain


def test_what_an_earlier_version_recorded_is_continued(
    make_tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = load_model(str(make_tiny_model("llama")), dtype="float32")
    earlier = hash_tokenizer(small.tokenizer, chat=True)

    def by_earlier_rule(*_: Any, **__: Any) -> str:
        return earlier

    # An ablation finds outcomes by their texts, and its store keeps the identity that it began with.
    engine = Engine(Ablation(tasks=("mr",)), small)
    assert engine.identity_as({"tokenizer": earlier}) == engine.identity | {"tokenizer": earlier}
    assert engine.identity_as({"tokenizer": "sha256:other"}) == engine.identity
    scorers = {
        "sparsity": lambda: sparsort.SparsityScorer(small),
        "loss": lambda: sparsort.LossScorer(small, on="prompt"),
        "length": lambda: sparsort.LengthScorer(model=small.name),
        "candidates": lambda: CandidateScorer(small, sites=["pre_norm"], poolings=["last"], outliers=["rms"]),
    }
    with monkeypatch.context() as patch:
        for module in ("sparsity", "baselines"):
            patch.setattr(f"sparsort.scoring.scorers.{module}.identify_tokenizer", by_earlier_rule)
        before = {name: make().score(ROWS, "{text}", out=tmp_path / name) for name, make in scorers.items()}
    for name, make in scorers.items():
        assert earlier in str(before[name].provenance)
        again = make().score(ROWS, "{text}", out=tmp_path / name)
        assert again.provenance == before[name].provenance
        assert make().score(ROWS, "{text}", like=before[name]).difficulty.tolist() == again.difficulty.tolist()
        assert earlier not in str(make().score(ROWS, "{text}").provenance)


def test_a_calibration_that_recorded_the_chat_template_of_a_plain_prompt_applies(
    make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    small = load_model(str(make_tiny_model("llama")), dtype="float32")
    rows = [{"text": f"word {n} " * (1 + n % 5)} for n in range(40)]
    options: dict[str, Any] = {
        "sites": ["pre_norm"],
        "poolings": ["last"],
        "outliers": ["none"],
        "n_boot": 100,
        "n_perm": 39,
    }
    made = sparsort.calibrate(rows, "{text}", level=list(range(40)), model=small, **options)

    def recording(tokenizer: str) -> Calibration:
        return replace(made, definition=replace(made.definition, tokenizer=tokenizer))

    earlier = recording(hash_tokenizer(small.tokenizer, chat=True))
    assert earlier.definition.tokenizer != made.definition.tokenizer
    expected = CalibratedScorer(made, small).score(rows).difficulty.tolist()
    assert CalibratedScorer(earlier, small).score(rows, out=tmp_path / "scores").difficulty.tolist() == expected
    with pytest.raises(SparsortError, match="a different tokenizer"):
        CalibratedScorer(recording("sha256:other"), small)
