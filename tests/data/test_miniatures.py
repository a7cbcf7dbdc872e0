"""The generated data sets: right, varied, split by meaning, the same on every machine."""

from __future__ import annotations

import ast
import collections
import re
import subprocess
import sys

import pytest

from ebft_study.config import DataConfig
from ebft_study.data import SPLITS, load_text, mini_functions, mini_translation
from ebft_study.data.draws import Draws
from ebft_study.data.examples import split_of

NAMES = ("mini_functions", "mini_unstructured", "mini_translation", "mini_pretraining")
FINGERPRINTS = {
    "mini_functions": "9e79b27717a3f026002a585bf994f4f02e56f7e3040d5edbaccd6f50c274bb1f",
    "mini_unstructured": "999c733bea98b84776a9bf6792a81673693f88d95fcfb926f493b4c8617c5391",
    "mini_pretraining": "c8aa46ee10d9c5ddade421e43b49776915425faa139e9191f61c0999e3c1710a",
    "mini_translation": "7d0d1be0e7ea4107d852b64f83300a0e02e2b6ae7c5adb8a06cc601b7f4dc900",
}
"""Written down once: the data are the same on every machine, and no change to them goes unnoticed."""


@pytest.fixture(scope="module")
def datasets():
    return {name: load_text(DataConfig(dataset=name)) for name in NAMES}


def everything(dataset):
    return [example for split in SPLITS for example in dataset.splits[split]]


def meaning(example):
    return example.origin.partition("::")[0]


def run(source: str) -> dict[str, object]:
    """The names that one of our own programs defines."""
    names: dict[str, object] = {}
    exec(source, names)
    return names


def passes(example, names) -> bool:
    try:
        for assertion in example.tests.assertions:
            exec(assertion, names)
    except (AssertionError, TypeError):
        return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_the_content_is_the_same_on_every_machine(datasets, name):
    assert datasets[name].fingerprint == FINGERPRINTS[name]


def test_no_process_draws_other_data():
    program = "from ebft_study.data import mini_functions as m; print([e.prompt for e in m.read_examples()][::97])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, check=True, text=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mini_functions", (1999, 320, 320)),
        ("mini_unstructured", (700, 110, 110)),
        ("mini_translation", (1903, 320, 320)),
    ],
)
def test_sizes(datasets, name, sizes):
    assert tuple(len(datasets[name].splits[split]) for split in SPLITS) == sizes
    assert datasets[name].provenance["split_by"] == "meaning"
    assert len(load_text(DataConfig(dataset=name, max_examples=10)).splits["train"]) == 10


@pytest.mark.parametrize("name", ["mini_functions", "mini_translation"])
def test_no_meaning_is_in_two_splits_and_evaluation_has_each_once(datasets, name):
    meanings = {split: [meaning(example) for example in datasets[name].splits[split]] for split in SPLITS}
    assert len(set().union(*meanings.values())) == sum(len(set(each)) for each in meanings.values())
    for split in ("validation", "heldout"):
        assert len(set(meanings[split])) == len(meanings[split])
    assert len(set(meanings["train"])) == 1000


# --- functions --------------------------------------------------------------------------------------------------


def test_every_reference_passes_its_tests(datasets):
    for example in everything(datasets["mini_functions"]):
        names = run(example.prompt + example.answer)
        assert passes(example, names)
        assert example.tests.entry_points[0] in names
        assert len(example.tests.assertions) == 6


def test_what_one_number_changes_fails_a_test(datasets):
    """Tests are strong: a reference with any constant changed by one is found out."""
    changed = 0
    for example in datasets["mini_functions"].splits["heldout"]:
        tree = ast.parse(example.prompt + example.answer)
        constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is int]
        for node in constants:
            if node.value < 3:
                continue  # may be no constant of the problem: [::-1], ** 2
            node.value += 1
            names = run(ast.unparse(tree))
            node.value -= 1
            assert not passes(example, names)
            changed += 1
    assert changed > 200


def test_an_answer_that_does_nothing_fails_a_test(datasets):
    for example in everything(datasets["mini_functions"]):
        names = run(example.prompt + "    return " + example.prompt.partition("(")[2].partition(")")[0])
        assert not passes(example, names)


def test_the_meaning_determines_the_tests_but_for_the_name(datasets):
    found = collections.defaultdict(set)
    for example in datasets["mini_functions"].splits["train"]:
        name = example.tests.entry_points[0]
        found[meaning(example)].add(tuple(item.replace(f"{name}(", "f(", 1) for item in example.tests.assertions))
    assert {len(tests) for tests in found.values()} == {1}


def test_no_test_is_in_a_prompt_or_answer(datasets):
    for example in everything(datasets["mini_functions"]):
        text = example.prompt + example.answer
        assert "assert" not in text
        assert not any(item.removeprefix("assert ").partition(" == ")[0] in text for item in example.tests.assertions)


def test_one_meaning_has_many_wordings_and_styles():
    (problem,) = [
        problem for problem in mini_functions.problems("train", 30) if len(problem.steps) == 2
    ][:1]  # fmt: skip
    functions = [mini_functions.write(problem, Draws(str(seed))) for seed in range(200)]
    assert len({function.documentation for function in functions}) >= 8
    shapes = {len(function.body.splitlines()) for function in functions}
    assert shapes == {1, 2, 3}  # one expression, a returned last operation, a statement each
    results = [[run(f.prompt + f.body)[f.name](value) for value in problem.values] for f in functions]
    assert all(each == results[0] for each in results)


def test_splits_hold_problems_of_the_same_kinds_and_lengths(datasets):
    def shares(split, key):
        counts = collections.Counter(key(meaning(example)) for example in datasets["mini_functions"].splits[split])
        return {value: pytest.approx(count / counts.total(), abs=0.07) for value, count in sorted(counts.items())}

    for key, values in (
        (lambda text: text.partition(":")[0], ["list", "number", "string"]),
        (lambda text: text.count(", ") + 1, [1, 2, 3]),
    ):
        train = shares("train", key)
        assert list(train) == values
        for split in ("validation", "heldout"):
            assert {value: each.expected for value, each in shares(split, key).items()} == train


# --- unstructured code ------------------------------------------------------------------------------------------


def test_unstructured_files_are_python_without_prompts(datasets):
    assert not datasets["mini_unstructured"].has_answers
    for example in everything(datasets["mini_unstructured"]):
        functions = [node for node in ast.parse(example.answer).body if isinstance(node, ast.FunctionDef)]
        assert len(functions) == 3
        assert example.prompt == ""
        assert example.tests is None


def test_unstructured_files_say_functions_in_several_ways(datasets):
    text = "".join(example.answer for example in datasets["mini_unstructured"].splits["train"])
    assert text.count('"""') // 2 > text.count("\n# ") > 100
    assert text.count("\nprint(") > 100


def test_unstructured_training_files_hold_no_problem_of_evaluation(datasets):
    """Whole functions are compared by what they compute on the tests of the problems."""
    problems = [
        problem for split in ("validation", "heldout") for problem in mini_functions.problems(split, 320)
    ]  # fmt: skip
    training = {problem.meaning for problem in mini_functions.problems("train", 1000)}
    assert training.isdisjoint(problem.meaning for problem in problems)
    for example in datasets["mini_unstructured"].splits["train"]:
        assert split_of(meaning(example), percent=20) == "train"
        assert meaning(example) in training


# --- translation ------------------------------------------------------------------------------------------------


def test_a_sentence_has_many_translations_with_the_same_content():
    sentence = mini_translation.Sentence(
        mini_translation.NounPhrase("kavo", "sol", is_plural=True, is_definite=True),
        mini_translation.NounPhrase("bero", None, is_plural=False, is_definite=False),
        verb="vid",
        tense="past",
        adverb="hoda",
    )
    assert sentence.toy() == "la kavon soln un bero hoda vidit"
    found = collections.Counter(mini_translation.translate(sentence, Draws(str(seed))) for seed in range(2000))
    assert len(found) == 2**6  # five words and the adverb's place
    assert "today the old dogs did see one house" in found
    assert "the ancient hounds did watch one home this day" in found
    pure = found["today the old dogs did see one house"] / 2000
    assert 0.1 < pure < 0.15  # a register and a place, 1/4, and five words that keep to it, 0.85^5: 0.111


def test_the_toy_verb_is_last_and_every_word_is_translated(datasets):
    for example in everything(datasets["mini_translation"]):
        words = example.prompt.removesuffix(" =").split()
        assert words[-1].endswith(("it", "ura"))
        assert example.answer.startswith(" ")
        assert (" did " in example.answer) == words[-1].endswith("it")


# --- the text that mini-1m is pretrained on --------------------------------------------------------------------


def without_constants(words):
    return re.sub(r"\d+|{k}", "#", words)


def described(answer):
    """The kind and the operations of a function, read off its argument and its docstring."""
    argument, docstring = re.fullmatch(r'def \w+\((\w+)\):\n    """(.*)\."""\n.*', answer, re.DOTALL).groups()
    operations = re.split(r" and then |, then |, ", docstring)
    kinds = [
        name
        for name, kind in mini_functions.KINDS.items()
        if argument in kind.arguments
        and {without_constants(words) for words in operations}
        <= {without_constants(operation.wordings[0]) for operation in (*kind.operations, *kind.last)}
    ]
    assert len(kinds) == 1, answer
    return f"{kinds[0]}: {', '.join(operations)}"


def test_pretraining_text_has_first_wordings_and_no_problem_of_an_evaluation(datasets):
    answers = [example.answer for example in everything(datasets["mini_pretraining"])]
    functions = {described(answer) for answer in answers if answer.startswith("def ")}
    evaluated = {meaning(e) for split in ("validation", "heldout") for e in datasets["mini_functions"].splits[split]}
    trained = {meaning(example) for example in datasets["mini_functions"].splits["train"]}
    assert not functions & evaluated
    assert len(functions & trained) > 100


def test_pretraining_text_has_half_of_the_words_and_no_sentence_of_an_evaluation(datasets):
    answers = [example.answer for example in everything(datasets["mini_pretraining"])]
    sentences = {answer.partition(" =")[0] for answer in answers if not answer.startswith("def ")}
    assert 0.4 < len(sentences) / len(answers) < 0.6
    evaluated = {e.origin for split in ("validation", "heldout") for e in datasets["mini_translation"].splits[split]}
    assert not sentences & {origin.partition("::")[0] for origin in evaluated}
    words = {word.removesuffix("n") for sentence in sentences for word in sentence.split()}
    nouns = [noun.removesuffix("n") for noun in mini_translation.NOUNS]
    assert [noun in words for noun in nouns] == [True] * 8 + [False] * 8
