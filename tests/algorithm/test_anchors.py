"""Anchors, masks and noise against loops over the definition."""

from __future__ import annotations

import pytest
import torch

from ebft_study.algorithm.anchors import completions_at, contexts_of, document_positions, find_anchors
from ebft_study.algorithm.sampling import draw, uniforms


def obvious_anchors(documents: list[int], G: int, s: int, C: int, answers: list[bool] | None = None) -> list[int]:
    """Walk over every position and ask the definition."""
    found = []
    for a in range(len(documents)):
        document = documents[a]
        if document < 0:
            continue
        start = documents.index(document)
        offset = a - start
        inside = a + G <= len(documents) and all(d == document for d in documents[a : a + G])
        answered = answers is None or (inside and all(answers[a : a + G]))
        if offset >= C and (offset - C) % s == 0 and inside and answered:
            found.append(a)
    return found


LAYOUTS = [
    [0] * 24,
    [0] * 13 + [-1] * 11,
    [0] * 9 + [1] * 10 + [2] * 5,
    [0] * 3 + [1] * 14 + [-1] * 7,
    [0] * 2 + [-1] * 22,
]


@pytest.mark.parametrize(("G", "s", "C"), [(1, 1, 1), (4, 4, 4), (3, 2, 5), (8, 5, 1), (24, 1, 1)])
@pytest.mark.parametrize("with_answers", [False, True])
def test_anchors_are_those_of_the_definition(G: int, s: int, C: int, with_answers: bool) -> None:
    answers = [[i % 11 > 2 for i in range(24)] for _ in LAYOUTS] if with_answers else None
    anchors = find_anchors(
        torch.tensor(LAYOUTS),
        completion_length=G,
        stride=s,
        first_context_length=C,
        answer_mask=torch.tensor(answers) if answers else None,
    )
    for row, documents in enumerate(LAYOUTS):
        expected = obvious_anchors(documents, G, s, C, answers[row] if answers else None)
        assert anchors.positions[row][anchors.valid[row]].tolist() == expected
    assert int(anchors.valid.sum(dim=1).max()) == anchors.positions.shape[1]


@pytest.mark.parametrize(("T", "G", "s"), [(24, 8, 8), (25, 8, 8), (128, 8, 8), (12, 4, 4)])
def test_a_full_sequence_has_the_papers_number_of_anchors(T: int, G: int, s: int) -> None:
    anchors = find_anchors(torch.zeros(1, T).long(), completion_length=G, stride=s, first_context_length=s)
    assert anchors.positions.shape[1] == (T - G) // s


def test_a_sequence_without_room_has_no_anchor() -> None:
    anchors = find_anchors(torch.zeros(2, 7).long(), completion_length=8, stride=1, first_context_length=1)
    assert anchors.positions.shape == (2, 0)


def test_completions_are_the_tokens_after_the_anchor() -> None:
    tokens = torch.arange(20)[None]
    anchors = find_anchors(torch.zeros(1, 20).long(), completion_length=3, stride=4, first_context_length=2)
    assert completions_at(tokens, anchors, 3)[0].tolist() == [[a, a + 1, a + 2] for a in (2, 6, 10, 14)]


def test_a_context_never_holds_another_documents_tokens() -> None:
    documents = torch.tensor([[0] * 6 + [1] * 8 + [-1] * 2])
    anchors = find_anchors(documents, completion_length=2, stride=2, first_context_length=2)
    start, end = contexts_of(documents, anchors)
    for b, a in enumerate(anchors.positions[0].tolist()):
        own = [i for i in range(16) if i < a and documents[0, i] == documents[0, a]]
        assert list(range(int(start[0, b]), int(end[0, b]))) == own


def test_positions_start_again_with_every_document() -> None:
    assert document_positions(torch.tensor([[0, 0, 0, 1, 1, -1]]))[0, :5].tolist() == [0, 1, 2, 0, 1]


def test_noise_of_a_sequence_depends_on_neither_batch_nor_padding() -> None:
    many = uniforms((3, 1), [5, 9, 2], n_anchors=6, n_samples=4, length=8)
    alone = uniforms((3, 1), [9], n_anchors=4, n_samples=4, length=8)
    assert torch.equal(many[1, :4], alone[0])
    assert not torch.equal(many[0], many[1])
    assert not torch.equal(uniforms((4, 1), [9], n_anchors=4, n_samples=4, length=8), alone)
    assert float(many.min()) >= 0
    assert float(many.max()) < 1


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_draws_follow_the_tempered_softmax(temperature: float) -> None:
    from scipy.stats import chisquare

    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, float("-inf")])
    noise = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    expected = (logits / temperature).softmax(-1)
    tokens = draw(expected, noise)
    counts = torch.bincount(tokens, minlength=5)
    assert counts[4] == 0
    assert chisquare(counts[:4].numpy(), (expected[:4] * 20_000).double().numpy(), sum_check=False).pvalue > 0.01


def test_the_largest_noise_draws_a_token_of_positive_probability() -> None:
    logits = torch.tensor([0.0, 0.0, float("-inf")])
    tokens = draw(logits.softmax(-1), torch.tensor([1 - 2**-24, 0.0]))
    assert tokens.tolist() == [1, 0]


def test_no_noise_at_all_draws_a_token_of_positive_probability() -> None:
    assert draw(torch.tensor([0.0, 0.0, 0.5, 0.5]), torch.tensor([0.0])).tolist() == [2]


def test_probabilities_need_not_sum_to_one() -> None:
    assert draw(torch.tensor([2.0, 2.0, 4.0]), torch.tensor([0.2, 0.3, 0.6, 0.99])).tolist() == [0, 1, 2, 2]
