"""Prompts and choices to token ids: by hand, and as the standard harness does it."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.encoding import PromptEncoder
from ssmlora_dist.long_texts import PIECE
from ssmlora_dist.models.tokenizer import load_tokenizer
from ssmlora_dist.tokenization import TextEncoder
from tests.tiny import tiny_model

BOS, EOS = "<|bos|>", "<|eos|>"
VOCAB_SIZE = 300


def merging_tokenizer(adds_bos: bool, has_bos: bool = True) -> PreTrainedTokenizerFast:
    """Bytes with three merges: `ab`, space and `y`, `the` behind a space."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("Ġ", "y"), ("t", "h"), ("th", "e"), ("Ġ", "the")]
    vocabulary = [*symbols, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(vocabulary)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS] if has_bos else [EOS])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS if has_bos else None,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )


KINDS: dict[str, Any] = {
    "plain": lambda: merging_tokenizer(adds_bos=False),
    "adds bos": lambda: merging_tokenizer(adds_bos=True),
    "no bos": lambda: merging_tokenizer(adds_bos=False, has_bos=False),
    "bytes": lambda: load_tokenizer("bytes"),
}


def encoder_of(tokenizer: Any, max_length: int = 64) -> PromptEncoder:
    return PromptEncoder(tokenizer, max_length, VOCAB_SIZE)


def tokens(tokenizer: Any, ids: list[int]) -> list[str]:
    return tokenizer.convert_ids_to_tokens(ids)


def test_a_choice_is_what_it_adds_to_the_prompt() -> None:
    tokenizer = merging_tokenizer(adds_bos=True)
    encoded = encoder_of(tokenizer).choices("x the", [" y", " yb"])
    assert tokens(tokenizer, encoded.prompt) == [BOS, "x", "Ġthe"]
    assert [tokens(tokenizer, ids) for ids in encoded.choices] == [["Ġy"], ["Ġy", "b"]]


def test_a_token_across_the_boundary_is_cut_as_the_harness_cuts_it() -> None:
    tokenizer = merging_tokenizer(adds_bos=False)
    encoded = encoder_of(tokenizer).choices("xa", ["b y", "cc"])
    assert tokens(tokenizer, encoded.prompt) == ["x", "a"]
    assert [tokens(tokenizer, ids) for ids in encoded.choices] == [["Ġy"], ["c", "c"]]


def test_spaces_at_the_end_of_the_prompt_go_to_the_choices() -> None:
    tokenizer = merging_tokenizer(adds_bos=False)
    encoded = encoder_of(tokenizer).choices("x \n ", ["y", "the"])
    assert tokens(tokenizer, encoded.prompt) == ["x"]
    assert [tokens(tokenizer, ids) for ids in encoded.choices] == [["Ġ", "Ċ", "Ġy"], ["Ġ", "Ċ", "Ġthe"]]


@pytest.mark.parametrize("kind", ["plain", "adds bos", "no bos"])
def test_an_empty_prompt_is_the_token_that_begins_texts(kind: str) -> None:
    tokenizer = KINDS[kind]()
    begins = EOS if kind == "no bos" else BOS
    encoded = encoder_of(tokenizer).choices("", ["ab", f"{begins}x"])
    assert tokens(tokenizer, encoded.prompt) == [begins]
    assert [tokens(tokenizer, ids) for ids in encoded.choices] == [["ab"], ["x"]]
    assert tokens(tokenizer, encoder_of(tokenizer).prompt("", 1)) == [begins]


@pytest.mark.parametrize("kind", ["plain", "adds bos"])
def test_a_prompt_that_spells_out_the_first_token_has_it_once(kind: str) -> None:
    tokenizer = KINDS[kind]()
    encoded = encoder_of(tokenizer).choices(f"{BOS}x", ["y"])
    assert tokens(tokenizer, encoded.prompt) == [BOS, "x"]
    assert tokens(tokenizer, encoder_of(tokenizer).prompt(f"{BOS}x", 1)) == [BOS, "x"]


PAIRS = [
    ("xa", "b y"),
    ("x the", " y"),
    ("x  ", "the y"),
    ("x\n\n", "ab"),
    ("", "ab the"),
    ("", f"{EOS}x"),
    (f"{BOS}x", " y"),
    ("é the", " é"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_standard_harness(kind: str) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    tokenizer = KINDS[kind]()
    harness = huggingface.HFLM(pretrained=tiny_model(vocab_size=VOCAB_SIZE), tokenizer=tokenizer)
    asked: list[Any] = []
    harness._loglikelihood_tokens = lambda requests, **_: asked.extend(requests)
    harness.loglikelihood([type("Request", (), {"args": pair}) for pair in PAIRS], disable_tqdm=True)
    for (prompt, choice), (_, context, continuation) in zip(PAIRS, asked, strict=True):
        encoded = encoder_of(tokenizer).choices(prompt, [choice])
        assert (encoded.prompt, *encoded.choices) == (context, continuation), (prompt, choice)


def test_what_is_longer_than_the_model_takes_is_refused() -> None:
    tokenizer = load_tokenizer("bytes")
    encoder = encoder_of(tokenizer, max_length=8)
    # The last token of a choice is predicted, never read.
    assert len(encoder.choices("12345", ["6789", "6"]).prompt) == 5
    with pytest.raises(DataError, match="are 9 tokens; the model takes 8"):
        encoder.choices("123456", ["7", "7890"])
    assert len(encoder.prompt("12345", 3)) == 5
    with pytest.raises(DataError, match="is 6 tokens, and 3 are to follow; the model takes 8"):
        encoder.prompt("123456", 3)


def test_a_choice_without_tokens_is_refused() -> None:
    tokenizer = merging_tokenizer(adds_bos=False)
    with pytest.raises(DataError, match="'b' adds no token to the prompt"):
        encoder_of(tokenizer).choices("xa", ["c", "b"])
    with pytest.raises(DataError, match="'' adds no token"):
        encoder_of(tokenizer).choices("xa", ["c", ""])


def test_an_id_beyond_the_vocabulary_is_refused() -> None:
    encoder = PromptEncoder(load_tokenizer("bytes"), 64, 99)
    with pytest.raises(DataError, match="gives the id 120, and the model's vocabulary has 99"):
        encoder.choices("ab", ["cx"])
    with pytest.raises(DataError, match="gives the id 120"):
        encoder.prompt("abx", 1)


def test_a_tokenizer_with_neither_first_nor_last_token_is_refused() -> None:
    tokenizer = merging_tokenizer(adds_bos=False, has_bos=False)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="neither a beginning- nor an end-of-sequence token"):
        encoder_of(tokenizer)


def test_long_texts_raise_no_warning_of_the_tokenizer(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.model_max_length = 4
    encoder_of(tokenizer).prompt("12345678", 1)
    assert not caplog.records


def test_what_is_far_too_long_is_not_encoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    encode = TextEncoder.encode

    def counted(self: TextEncoder, text: str) -> list[int]:
        given.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(TextEncoder, "encode", counted)
    encoder = PromptEncoder(merging_tokenizer(adds_bos=True), 100, VOCAB_SIZE)
    for ask in (lambda text: encoder.prompt(text, 4), lambda text: encoder.choices(text, [" a", " b"])):
        with pytest.raises(DataError, match=r"^the prompt is at least \d+ tokens; the model takes 100"):
            ask("a the " * 200_000)
    with pytest.raises(DataError, match=r"^a choice is at least \d+ tokens; the model takes 100"):
        encoder.choices("a", [" a", " a the" * 200_000])
    assert sum(given) < 9 * PIECE
