"""Messages to ids: templates with and without a system role, folding, padding, shared prefixes."""

from __future__ import annotations

import pytest
from conftest import CHATML, NO_SYSTEM, byte_tokenizer, random_model

from trueline import (
    AdaCD,
    Blend,
    Contrast,
    DataError,
    Decoder,
    LanguageModel,
    LinearAlignment,
    ModelError,
    Plain,
    SelfCD,
)
from trueline.models.prompts import (
    default_system,
    encode,
    fold_system,
    pad_left,
    shared_length,
    system_prefix,
)
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
        ([{"role": "user", "content": "x", "name": "y"}], 'this one has also "name"'),
        ([{"role": "robot", "content": "x"}], "system, user, assistant"),
        ([{"role": "user", "content": 3}], "user message is empty"),
        ([USER, SYSTEM], "must come first"),
        (["Why?"], "A message must be"),
    ],
)
def test_what_is_not_a_chat_is_named(messages, fragment):
    with pytest.raises(DataError, match=fragment):
        check_messages(messages)


# A template with a system text of its own

DEFAULT = "You are Bot. Be useful."
KEEPS = "{% if messages[0].role != 'system' %}<|system|>" + DEFAULT + "<|end|>{% endif %}" + CHATML
CUTS = KEEPS.replace("{{ m['content'] }}", "{{ m['content'][:15] }}")
MORE_THAN_THE_TEXT = KEEPS.replace("<|end|>{% endif %}", "<|end|>Now: <|end|>{% endif %}")
ALWAYS = (
    "<|system|>Today: {% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "<|end|>" + CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [(KEEPS, DEFAULT), (CHATML, None), (NO_SYSTEM, None), (DROPS_SYSTEM, None), (ALWAYS, None),
     (MORE_THAN_THE_TEXT, None), (CUTS, None), ("{{ 1 / 0 }}", None), (None, None)],
    ids=["default", "none", "raises", "drops", "head", "more", "cuts", "broken", "no template"],
)  # fmt: skip
def test_the_default_system_text_is_found_in_the_template(model, template, expected):
    lm = LanguageModel(model, byte_tokenizer(template))
    assert default_system(lm) == expected
    assert default_system(LanguageModel(model, byte_tokenizer(template), raw=True)) is None


@pytest.mark.parametrize(
    "method",
    [
        Plain(),
        Plain(principle="Be kind."),
        LinearAlignment(principle="Be kind."),
        SelfCD(),
        AdaCD(),
        Blend(principles=(("Be kind.", 1.0), ("Be brief.", 0.5))),
        Contrast(principle="Be kind.", negative="Be rude."),
    ],
    ids=lambda m: m.name,
)
def test_it_stays_in_every_branch_in_front_of_what_a_method_adds(model, method):
    lm = LanguageModel(model, byte_tokenizer(KEEPS))
    branches = Decoder(lm).encode("Why?", method).branches
    texts = [lm.tokenizer.decode(ids) for ids in branches]
    without = LanguageModel(model, byte_tokenizer(CHATML))
    own = [without.tokenizer.decode(b) for b in Decoder(without).encode("Why?", method).branches]
    assert len(texts) == len(own)
    for found, bare in zip(texts, own, strict=True):
        system = f"<|system|>{DEFAULT}"
        # by hand: the text in front of the method's own, or alone
        if bare.startswith("<|system|>"):
            assert found == f"{system}\n\n{bare.removeprefix('<|system|>')}"
        else:
            assert found == f"{system}<|end|>{bare}"


def test_a_callers_own_system_message_replaces_it_and_an_empty_one_takes_it_out(model):
    lm = LanguageModel(model, byte_tokenizer(KEEPS))
    method = LinearAlignment(principle="Be brief.")
    for content, plain, led in (("Be kind.", "Be kind.", "Be kind.\n\nBe brief."),
                                ("", "", "Be brief.")):  # fmt: skip
        chat = [{"role": "system", "content": content}, USER]
        principled, bare = Decoder(lm).encode(chat, method).branches
        rest = "<|end|><|user|>Why?<|end|><|assistant|>"
        assert lm.tokenizer.decode(bare) == f"<|system|>{plain}{rest}"
        assert lm.tokenizer.decode(principled) == f"<|system|>{led}{rest}"


def test_it_can_be_left_out_of_all_branches(model):
    lm = LanguageModel(model, byte_tokenizer(KEEPS), default_system=False)
    rest = "<|end|><|user|>Why?<|end|><|assistant|>"
    principled, bare = Decoder(lm).encode("Why?", LinearAlignment(principle="Be brief.")).branches
    assert lm.tokenizer.decode(bare) == f"<|system|>{rest}"
    assert lm.tokenizer.decode(principled) == f"<|system|>Be brief.{rest}"
    assert text(lm, [SYSTEM, USER]) == f"<|system|>Be kind.{rest}"
    # a template without such a text gets no message that it would show
    other = LanguageModel(model, byte_tokenizer(CHATML), default_system=False)
    assert text(other, [USER]) == "<|user|>Why?<|end|><|assistant|>"


def test_an_empty_system_message_adds_nothing_where_there_is_no_role_for_it(model):
    chat = [{"role": "system", "content": ""}, USER]
    for template in (NO_SYSTEM, DROPS_SYSTEM):
        lm = LanguageModel(model, byte_tokenizer(template))
        assert text(lm, chat) == text(lm, [USER])
    raw = LanguageModel(model, byte_tokenizer(None), raw=True)
    assert text(raw, chat) == "Why?"
    with pytest.raises(DataError, match="system message is empty"):
        check_messages([{"role": "system", "content": " "}, USER])


def test_teachers_and_scores_see_the_prompts_that_decoding_sees(model):
    from trueline.evals.likelihood import branch_items
    from trueline.train.distil.teachers import make_teacher

    lm = LanguageModel(model, byte_tokenizer(KEEPS))
    method = LinearAlignment(principle="Be brief.")
    wanted = Decoder(lm).encode("Why?", method).branches
    teacher = make_teacher("linear-alignment", {"principle": "Be brief."})
    lesson = teacher.lesson(lm, {"prompt": "Why?"})
    assert lesson.branches == wanted
    assert lesson.prompt == wanted[1]  # the student's: the default text, no principle
    led = make_teacher("linear-alignment", {"principle": "Be brief."}, student="prompted")
    assert led.lesson(lm, {"prompt": "Why?"}).prompt == wanted[0]
    assert [list(b) for b in branch_items(lm, method, [[USER]], [[5]])[0].branches] == wanted


def test_on_the_command_line(model, tmp_path, capsys):
    from trueline.cli import main

    model.save_pretrained(tmp_path)
    byte_tokenizer(KEEPS).save_pretrained(tmp_path)
    shown = {}
    for name, more in {
        "default": (), "same": ("--system", DEFAULT), "empty": ("--system", ""),
        "none": ("--no-default-system",), "own": ("--system", "Be kind."),
    }.items():  # fmt: skip
        argv = ("generate", "Why?", "--model", str(tmp_path), "--max-new-tokens", "8", *more)
        assert main([*argv]) == 0
        shown[name] = capsys.readouterr().out
    assert shown["default"] == shown["same"]
    assert shown["empty"] == shown["none"]
    assert len({shown[name] for name in ("default", "empty", "own")}) == 3
