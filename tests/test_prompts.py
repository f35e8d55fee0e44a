"""Messages to ids: templates with and without a system role, folding, padding, shared prefixes."""

from __future__ import annotations

import pytest
from conftest import CHATML, NO_SYSTEM, byte_tokenizer, random_model

from trueline import DataError, LanguageModel, ModelError
from trueline.models.prompts import encode, fold_system, pad_left, shared_length, system_prefix
from trueline.types import check_messages

USER = {"role": "user", "content": "Why?"}
SYSTEM = {"role": "system", "content": "Be kind."}
DROPS_SYSTEM = CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")


@pytest.fixture(scope="module")
def model():
    return random_model("llama")


def text(lm, messages):
    return lm.tokenizer.decode(encode(lm, messages))


def test_the_template_decides(model):
    lm = LanguageModel(model, byte_tokenizer())
    assert text(lm, [SYSTEM, USER]) == "<|system|>Be kind.<|end|><|user|>Why?<|end|><|assistant|>"


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM], ids=["raises", "drops"])
def test_no_system_role_folds_into_the_first_user_turn(model, template):
    lm = LanguageModel(model, byte_tokenizer(template))
    answer = {"role": "assistant", "content": "Because."}
    first = "<|user|>Be kind.\n\nWhy?<|end|>"
    expected = f"{first}<|assistant|>Because.<|end|><|user|>Why?<|end|><|assistant|>"
    assert text(lm, [SYSTEM, USER, answer, USER]) == expected


def test_fold_leaves_the_rest_alone():
    assert fold_system([SYSTEM, USER]) == [{"role": "user", "content": "Be kind.\n\nWhy?"}]


def test_a_last_assistant_message_is_continued(model):
    lm = LanguageModel(model, byte_tokenizer())
    start = {"role": "assistant", "content": "Well, "}
    assert text(lm, [USER, start]).endswith("<|assistant|>Well, ")


def test_no_template_names_both_ways_out(model):
    lm = LanguageModel(model, byte_tokenizer(None), "base")
    with pytest.raises(ModelError, match=r"--chat-template FILE.*--raw"):
        encode(lm, [USER])
    raw = LanguageModel(model, byte_tokenizer(None), "base", raw=True)
    assert text(raw, [SYSTEM, USER]) == "Be kind.\nWhy?"


def test_what_the_template_refuses_is_the_callers_error(model):
    template = "{{ raise_exception('roles must alternate') }}"
    lm = LanguageModel(model, byte_tokenizer(template), "strict")
    with pytest.raises(DataError, match=r"strict.*roles must alternate"):
        encode(lm, [USER, USER])


@pytest.mark.parametrize(
    "program",
    [
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content.x.y }}",
        "{{ messages + 1 }}",
        "{{ [1] * 10 ** 30 }}",
        "{{ 'a' | nothing }}",
        "{% for %}",
        "{{ messages.__class__.__mro__ }}{{ messages.clear() }}",
        "{{ range(10 ** 9) | list }}",
        "{{ messages | map('upper', 1) | list }}",
    ],
)
def test_a_template_that_goes_wrong_is_one_line(model, program):
    lm = LanguageModel(model, byte_tokenizer(program), "wrong")
    with pytest.raises(DataError, match='chat template of "wrong" refuses') as refused:
        encode(lm, [USER])
    assert "\n" not in str(refused.value)


def test_padding_is_on_the_left():
    ids, mask = pad_left([[5, 6], [7]], 0, "cpu")
    assert ids.tolist() == [[5, 6], [0, 7]]
    assert mask.tolist() == [[1, 1], [0, 1]]


def test_system_prefix_is_what_all_questions_share(model):
    lm = LanguageModel(model, byte_tokenizer())
    prefix = system_prefix(lm, [SYSTEM, USER])
    assert lm.tokenizer.decode(prefix) == "<|system|>Be kind.<|end|><|user|>"
    assert shared_length(prefix, encode(lm, [SYSTEM, USER])) == len(prefix)
    assert shared_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert shared_length([], [1]) == 0


@pytest.mark.parametrize(
    ("messages", "fragment"),
    [
        ("", "user message is empty"),
        ([], "no user message"),
        ([SYSTEM], "no user message"),
        ([{"role": "user"}], "A message must be"),
        ([{"role": "user", "content": "x", "name": "y"}], "A message must be"),
        ([{"role": "robot", "content": "x"}], "system, user, assistant"),
        ([{"role": "user", "content": 3}], "user message is empty"),
        ([USER, SYSTEM], "must come first"),
        (["Why?"], "A message must be"),
    ],
)
def test_what_is_not_a_chat_is_named(messages, fragment):
    with pytest.raises(DataError, match=fragment):
        check_messages(messages)
