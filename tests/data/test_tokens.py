"""Rows of tokens: masks, padding, packing, and the order of batches."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ebft_study.data import Example, TokenDataset, batch_indices, tokenize
from ebft_study.data import tokens as tokenization
from ebft_study.errors import DataError

TEXT = "def add(left, right):\n    return left + right\n\nclass Sum:\n    total = 0\n" * 20
T = 16


def train_tokenizer(**special) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(eos_token="<eos>", pad_token="<pad>")


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def documents_of(dataset: TokenDataset, row: int) -> list[list[int]]:
    """Tokens of each document of a row, by its ids; checks that ids count up from 0 and padding ends the row."""
    numbers = dataset.document_ids[row].tolist()
    real = [number for number in numbers if number >= 0]
    assert numbers == real + [-1] * (len(numbers) - len(real))
    assert real == sorted(real)
    assert set(real) == set(range(max(real) + 1))
    tokens = dataset.tokens[row].tolist()
    return [[token for token, n in zip(tokens, numbers, strict=True) if n == number] for number in range(max(real) + 1)]


def random_texts(count, longest, seed=0):
    generator = random.Random(seed)
    return [TEXT[(start := generator.randrange(400)) : start + generator.randint(1, longest)] for _ in range(count)]


def raw(texts):
    return [Example("", text, f"file{number}") for number, text in enumerate(texts)]


def test_raw_text_is_cut_into_consecutive_rows(tokenizer):
    texts = random_texts(20, 300)
    dataset = tokenize(raw(texts), tokenizer, sequence_length=T, packing=False, has_answers=False)
    expected = [
        chunk
        for text in texts
        for begin in range(0, len(ids(tokenizer, text)), T)
        if len(chunk := ids(tokenizer, text)[begin : begin + T]) > 1
    ]
    assert [documents_of(dataset, row) for row in range(len(dataset))] == [[chunk] for chunk in expected]
    assert not dataset.answer_mask.any()


def test_padding_is_the_padding_token_with_document_minus_one(tokenizer):
    dataset = tokenize(raw([TEXT[:10]]), tokenizer, sequence_length=T, packing=False, has_answers=False)
    padding = dataset.document_ids == -1
    assert padding.any()
    assert (dataset.tokens[padding] == tokenizer.pad_token_id).all()
    assert dataset.tokens.shape == dataset.document_ids.shape == dataset.answer_mask.shape == (1, T)
    assert (dataset.tokens.dtype, dataset.document_ids.dtype, dataset.answer_mask.dtype) == (
        torch.int64,
        torch.int64,
        torch.bool,
    )


def test_padding_falls_back_to_eos():
    tokenizer = train_tokenizer(eos_token="<eos>")
    dataset = tokenize(raw(["a b"]), tokenizer, sequence_length=T, packing=False, has_answers=False)
    assert dataset.tokens[0, -1] == tokenizer.eos_token_id


def test_packing_raw_text_loses_no_token_and_marks_every_boundary(tokenizer):
    texts = random_texts(30, 100)
    dataset = tokenize(raw(texts), tokenizer, sequence_length=T, packing=True, has_answers=False)
    eos = tokenizer.eos_token_id
    stream = [token for text in texts for token in [*ids(tokenizer, text), eos]]
    real = dataset.document_ids >= 0
    assert dataset.tokens[real].tolist() == stream
    assert real[:-1].all()  # only the last row is padded
    for row in range(len(dataset)):
        documents = documents_of(dataset, row)
        assert all(document[-1] == eos for document in documents[:-1])
        assert all(eos not in document[:-1] for document in documents)
        assert dataset.document_ids[row, 0] == 0


def pairs(count=40, prompt=40, answer=60):
    prompts, answers = random_texts(count, prompt, seed=1), random_texts(count, answer, seed=2)
    return [Example(p, a, str(n)) for n, (p, a) in enumerate(zip(prompts, answers, strict=True))]


def expected_pair(tokenizer, example, length):
    """(tokens, answer tokens) by the definition: prompt, answer and EOS, cut at `length`."""
    prompt, answer = ids(tokenizer, example.prompt), [*ids(tokenizer, example.answer), tokenizer.eos_token_id]
    return (prompt + answer)[:length], answer[: max(length - len(prompt), 0)]


def test_answer_masks_decode_to_the_answer(tokenizer):
    examples = pairs()
    dataset = tokenize(examples, tokenizer, sequence_length=200, packing=False, has_answers=True)
    assert (dataset.dropped, dataset.truncated) == (0, 0)
    for row, example in enumerate(examples):
        mask, real = dataset.answer_mask[row], dataset.document_ids[row] >= 0
        assert tokenizer.decode(dataset.tokens[row][mask]) == example.answer + "<eos>"
        assert tokenizer.decode(dataset.tokens[row][real & ~mask]) == example.prompt
        assert not (mask & ~real).any()


def test_truncation_and_dropping_follow_the_definition(tokenizer):
    examples = pairs(prompt=100)
    dataset = tokenize(examples, tokenizer, sequence_length=T, packing=False, has_answers=True)
    expected = [expected_pair(tokenizer, example, T) for example in examples]
    kept = [(tokens, answer) for tokens, answer in expected if answer]
    assert 0 < len(kept) < len(examples)
    assert dataset.dropped == len(examples) - len(kept)
    whole = [len(expected_pair(tokenizer, example, 10_000)[0]) for example in examples]
    assert dataset.truncated == sum(
        length > T and bool(answer) for length, (_, answer) in zip(whole, expected, strict=True)
    )
    for row, (tokens, answer) in enumerate(kept):
        assert documents_of(dataset, row) == [tokens]
        assert dataset.tokens[row][dataset.answer_mask[row]].tolist() == answer


def test_packing_pairs_keeps_every_example_whole(tokenizer):
    examples = pairs(count=60, prompt=12, answer=16)
    loose = tokenize(examples, tokenizer, sequence_length=64, packing=False, has_answers=True)
    packed = tokenize(examples, tokenizer, sequence_length=64, packing=True, has_answers=True)
    found = [
        (tuple(document), int(packed.answer_mask[row][packed.document_ids[row] == number].sum()))
        for row in range(len(packed))
        for number, document in enumerate(documents_of(packed, row))
    ]
    separate = [(tuple(documents_of(loose, row)[0]), int(loose.answer_mask[row].sum())) for row in range(len(loose))]
    assert sorted(found) == sorted(separate)
    total = sum(len(tokens) for tokens, _ in separate)
    assert len(packed) <= 1.3 * total / 64 + 1


def test_no_two_packed_rows_would_fit_into_one(tokenizer):
    packed = tokenize(
        pairs(count=60, prompt=12, answer=16), tokenizer, sequence_length=64, packing=True, has_answers=True
    )
    first_document = [len(documents_of(packed, row)[0]) for row in range(len(packed))]
    used = (packed.document_ids >= 0).sum(dim=1).tolist()
    for row in range(1, len(packed)):  # a row was opened because its first example fitted nowhere before
        assert all(before + first_document[row] > 64 for before in used[:row])


def test_examples_that_fill_a_row_exactly_are_packed_into_it(tokenizer):
    examples = [Example("ask", "say", "0")] * 4
    loose = tokenize(examples, tokenizer, sequence_length=64, packing=False, has_answers=True)
    length = int((loose.document_ids[0] >= 0).sum())
    packed = tokenize(examples, tokenizer, sequence_length=2 * length, packing=True, has_answers=True)
    assert packed.document_ids.tolist() == [[0] * length + [1] * length] * 2


def test_the_answer_continues_in_a_packed_row_after_its_own_prompt(tokenizer):
    packed = tokenize(
        pairs(count=20, prompt=12, answer=16), tokenizer, sequence_length=64, packing=True, has_answers=True
    )
    for row in range(len(packed)):
        for number in range(int(packed.document_ids[row].max()) + 1):
            mask = packed.answer_mask[row][packed.document_ids[row] == number].tolist()
            assert mask == sorted(mask)  # prompt first, answer after it
            assert mask[-1]


def test_bos_is_put_first_where_the_tokenizer_does_so():
    tokenizer = train_tokenizer(bos_token="<s>", eos_token="</s>")
    bos = tokenizer.bos_token_id
    for packing in (False, True):
        dataset = tokenize(
            [Example("ask", "say", "0")] * 2, tokenizer, sequence_length=T, packing=packing, has_answers=True
        )
        for row in range(len(dataset)):
            for document in documents_of(dataset, row):
                assert document.count(bos) == 1
                assert document[0] == bos
        assert not dataset.answer_mask[dataset.tokens == bos].any()
    chunks = tokenize(raw([TEXT[:200]]), tokenizer, sequence_length=T, packing=False, has_answers=False)
    assert (chunks.tokens == bos).sum() == 1
    assert chunks.tokens[0, 0] == bos


def test_special_tokens_written_in_text_do_not_end_a_document_early(tokenizer):
    """A tokenizer reads "<eos>" in text as its special token; boundaries come from document ids, not from it."""
    dataset = tokenize(raw(["a <eos> b", "c"]), tokenizer, sequence_length=T, packing=True, has_answers=False)
    first, second = documents_of(dataset, 0)
    assert tokenizer.decode(first) == "a <eos> b<eos>"
    assert tokenizer.decode(second) == "c<eos>"


@pytest.mark.parametrize(
    ("examples", "has_answers", "reason"),
    [
        ([], False, "none of 0 examples.*no document has two tokens"),
        ([Example("", "x", "0")], False, "no document has two tokens"),
        ([Example(TEXT, "x", "0")], True, "none of 1 examples.*every prompt fills the whole sequence"),
    ],
)
def test_a_sequence_length_that_leaves_nothing_is_refused(tokenizer, examples, has_answers, reason):
    with pytest.raises(DataError, match=f"sequence_length=16: .*{reason}"):
        tokenize(examples, tokenizer, sequence_length=T, packing=False, has_answers=has_answers)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("has_answers", [False, True])
def test_large_inputs_come_out_of_the_cache_unchanged(tokenizer, tmp_path, monkeypatch, packing, has_answers):
    examples = pairs() if has_answers else raw(random_texts(20, 100))
    settings = {"sequence_length": T, "packing": packing, "has_answers": has_answers}
    fresh = tokenize(examples, tokenizer, **settings)
    monkeypatch.setenv("EBFT_STUDY_CACHE", str(tmp_path))
    monkeypatch.setattr(tokenization, "CACHED_CHARACTERS", 0)
    tokenize(examples, tokenizer, **settings)
    monkeypatch.setattr(tokenization, "_tokenize", lambda *_: pytest.fail("tokenized again"))
    cached = tokenize(examples, tokenizer, **settings)
    for name in ("tokens", "document_ids", "answer_mask", "examples"):
        assert torch.equal(getattr(cached, name), getattr(fresh, name))
        assert getattr(cached, name).dtype == getattr(fresh, name).dtype
    assert (cached.dropped, cached.truncated) == (fresh.dropped, fresh.truncated)


def test_the_cache_tells_tokenizers_and_settings_apart(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("EBFT_STUDY_CACHE", str(tmp_path))
    monkeypatch.setattr(tokenization, "CACHED_CHARACTERS", 0)
    other = train_tokenizer(eos_token="<end>", pad_token="<pad>", unk_token="<unk>")
    for chosen in (tokenizer, other):
        for length in (8, 16):
            for packing in (False, True):
                tokenize(raw([TEXT]), chosen, sequence_length=length, packing=packing, has_answers=False)
    assert len(list((tmp_path / "data").iterdir())) == 8


def test_a_row_knows_its_example(tokenizer):
    """Rows are found again among the examples by their tokens; an example that was dropped keeps its number."""
    examples = [Example("ask " + TEXT, "never", "0"), *pairs(), Example("ask", "say", "1")]
    dataset = tokenize(examples, tokenizer, sequence_length=40, packing=False, has_answers=True)
    assert dataset.dropped > 0
    assert dataset.examples.dtype == torch.int64
    assert dataset.examples.shape == (len(dataset),)
    for row, number in enumerate(dataset.examples.tolist()):
        assert documents_of(dataset, row) == [expected_pair(tokenizer, examples[number], 40)[0]]


def test_every_row_of_a_document_has_its_number_and_a_packed_row_of_several_has_none(tokenizer):
    texts = ["a b c d e f g h i j k l m n o p q r s t", "", "z", TEXT[:300]]
    loose = tokenize(raw(texts), tokenizer, sequence_length=T, packing=False, has_answers=False)
    for row, number in enumerate(loose.examples.tolist()):
        assert tokenizer.decode(documents_of(loose, row)[0]) in texts[number]
    assert set(loose.examples.tolist()) == {0, 3}  # one token alone is no row
    packed = tokenize(raw(texts), tokenizer, sequence_length=T, packing=True, has_answers=False)
    several = [len(documents_of(packed, row)) > 1 for row in range(len(packed))]
    assert [number == -1 for number in packed.examples.tolist()] == several
    assert {True, False} == set(several)
    pairs_packed = tokenize(
        pairs(count=60, prompt=12, answer=16), tokenizer, sequence_length=64, packing=True, has_answers=True
    )
    alone = [row for row in range(len(pairs_packed)) if len(documents_of(pairs_packed, row)) == 1]
    assert (pairs_packed.examples >= 0).nonzero().flatten().tolist() == alone


def test_rows_gather_what_their_indices_say(tokenizer):
    dataset = tokenize(pairs(), tokenizer, sequence_length=40, packing=False, has_answers=True)
    batch = dataset.rows(torch.tensor([3, 0, 3])).to("cpu")
    assert batch.indices.tolist() == [3, 0, 3]
    for position, row in enumerate((3, 0, 3)):
        assert torch.equal(batch.tokens[position], dataset.tokens[row])
        assert torch.equal(batch.document_ids[position], dataset.document_ids[row])
        assert torch.equal(batch.answer_mask[position], dataset.answer_mask[row])


@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (10, 4), (7, 1), (3, 8), (1, 2)])
def test_every_epoch_is_a_permutation(size, batch_size):
    steps = 5 * size
    order = torch.cat([batch_indices(size=size, batch_size=batch_size, step=step, seed=3) for step in range(steps)])
    for epoch in range(len(order) // size):
        assert sorted(order[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))


def test_batches_depend_on_step_and_seed_alone():
    def batch(step, seed=0):
        return batch_indices(size=1000, batch_size=8, step=step, seed=seed).tolist()

    forward = [batch(step) for step in range(300)]
    assert [batch(step) for step in reversed(range(300))] == forward[::-1]
    assert batch(0) != batch(0, seed=1)
    assert forward[0] != batch(125)  # the next epoch has another order
    assert batch(0) == [459, 206, 222, 162, 711, 814, 350, 890]  # on every machine


def test_a_data_set_without_rows_cannot_be_batched():
    with pytest.raises(DataError, match="without rows"):
        batch_indices(size=0, batch_size=4, step=0, seed=0)


# --- long texts --------------------------------------------------------------------------------------------------


def encoded(tokenizer, text, monkeypatch):
    """Tokens of a text, and the texts that the tokenizer was given for it; each call takes 200 characters."""
    given: list[str] = []
    call = type(tokenizer).__call__

    def spy(self, texts, **keywords):
        given.extend(texts)
        return call(self, texts, **keywords)

    monkeypatch.setattr(tokenization, "CHARACTERS_PER_CALL", 200)
    monkeypatch.setattr(type(tokenizer), "__call__", spy)
    return next(tokenization._encode(tokenizer, [text])), [part for part in given if part in text and len(part) > 10]


def test_a_long_text_has_the_same_tokens_in_parts(tokenizer, monkeypatch):
    """300 bytes of bookkeeping per token are those of a part."""
    text, whole = TEXT + "  two  spaces, one word" * 40, ids(tokenizer, TEXT + "  two  spaces, one word" * 40)
    tokens, given = encoded(tokenizer, text, monkeypatch)
    assert tokens == whole
    assert "".join(given) == text
    assert max(map(len, given)) < 300


def test_a_text_is_not_cut_where_that_would_change_its_tokens(monkeypatch):
    """Tokenizers of the kind of Llama 2 put a space in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="\n")
    whole = ids(wrapped, TEXT)
    tokens, given = encoded(wrapped, TEXT, monkeypatch)
    assert tokens == whole
    assert given == [TEXT]


def test_calls_are_bounded_by_characters_and_by_texts(tokenizer):
    sizes = [len(batch) for batch in tokenization._batches(["x" * 50_000] * 5 + ["y"] * 200)]
    assert sizes[:2] == [2, 2]
    assert max(sizes) == tokenization.TEXTS_PER_CALL
    assert sum(sizes) == 205
