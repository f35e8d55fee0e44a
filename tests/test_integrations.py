"""Methods inside lm-evaluation-harness and Inspect: same numbers as the harness's own model."""

from __future__ import annotations

import json
import os
import warnings

import pytest
import torch
from conftest import byte_tokenizer, random_model
from processes import Process

from trueline import (
    AdaCD,
    ConfigError,
    DataError,
    Decoder,
    LanguageModel,
    LinearAlignment,
    ModelError,
    Request,
    SamplingParams,
    generate,
    load_model,
)
from trueline.integrations import split_options
from trueline.models.prompts import encode

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# The harness, datasets and their dependencies warn on import, each version in its own way.
pytestmark = pytest.mark.filterwarnings("ignore")
PRINCIPLE = "Be brief."


@pytest.fixture(scope="module")
def harness():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = "lm-eval is not installed: pip install 'trueline[lm-eval]'"
        return pytest.importorskip("lm_eval", reason=reason)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama and a byte tokenizer as a checkpoint."""
    path = tmp_path_factory.mktemp("model")
    random_model("llama", positions=128).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def trueline(pretrained, **options):
    from trueline.integrations.lm_eval import TruelineLM

    return TruelineLM(pretrained, **options)


def instances(*arguments):
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type="loglikelihood", doc={}, arguments=a, idx=i)
        for i, a in enumerate(arguments)
    ]


PAIRS = [
    ("Once upon a time there was", " a girl"),
    ("Tom saw a dog. ", "It was big"),
    ("Tom saw a dog.", " It ran"),
    ("Tom saw a dog.", " It sat"),
    ("", "The end of the story"),
    ("a long context " * 40, " that is cut"),
]
TEXTS = ["Once there was a dog.", "The sun was warm and the bird sang. " * 20, "A"]


def own_and_hf(pretrained, **options):
    from lm_eval.models.huggingface import HFLM

    ours = trueline(str(pretrained), method="plain", batch_size=4, **options)
    return ours, HFLM(pretrained=str(pretrained), device="cpu", batch_size=4, dtype="float32")


@pytest.mark.parametrize("source", ["random", "stories260K"])
def test_plain_gives_the_likelihoods_of_the_harness(harness, folder, shared, source):
    path = folder if source == "random" else shared / "models" / source
    ours, theirs = own_and_hf(path)
    a, b = (m.loglikelihood(instances(*PAIRS), disable_tqdm=True) for m in (ours, theirs))
    assert [x for x, _ in a] == pytest.approx([x for x, _ in b], abs=1e-4)
    assert [x for _, x in a] == [x for _, x in b]
    if source == "random":
        chats = [[{"role": "user", "content": q}] for q in ("Why?", "Who are you?")]
        pairs = [[(m.apply_chat_template(c), "Yes") for c in chats] for m in (ours, theirs)]
        a, b = (
            m.loglikelihood(instances(*p), disable_tqdm=True)
            for m, p in zip((ours, theirs), pairs, strict=True)
        )
        assert [x for x, _ in a] == pytest.approx([x for x, _ in b], abs=1e-4)
    texts = instances(*[(t,) for t in TEXTS])
    a, b = (m.loglikelihood_rolling(texts, disable_tqdm=True) for m in (ours, theirs))
    assert a == pytest.approx(b, abs=1e-3, rel=1e-5)


@pytest.mark.parametrize("sampled", [False, True])
def test_plain_generates_what_the_harness_generates(harness, shared, sampled):
    ours, theirs = own_and_hf(shared / "models" / "stories260K")
    kwargs = {"until": ["."], "max_gen_toks": 24, "do_sample": sampled}
    kwargs |= {"temperature": 1.0, "top_k": 1} if sampled else {}
    requests = instances(("Once upon a time", kwargs), ("Tom and Lily went to the", kwargs))
    a, b = (m.generate_until(requests, disable_tqdm=True) for m in (ours, theirs))
    assert a == b
    assert all(a)


def naive(lm, branches, tokens, combine):
    """Sum the log-probabilities of `tokens` one forward at a time."""
    total, greedy = 0.0, True
    for t, token in enumerate(tokens):
        rows = [torch.tensor([[*ids, *tokens[:t]]]) for ids in branches]
        with torch.inference_mode():
            z = torch.stack([lm.model(ids).logits[0, -1].float() for ids in rows])[None]
        combined = combine(t, z)[0]
        total += float(combined.log_softmax(-1)[token])
        greedy &= int(combined.argmax()) == token
    return total, greedy


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_linear_alignment_equals_a_naive_loop(harness, kind, chat, batch_size):
    lm = LanguageModel(random_model(kind), byte_tokenizer(), kind)
    ours = trueline(lm, principle=PRINCIPLE, ratio="2", candidates=1, batch_size=batch_size)
    method = LinearAlignment(PRINCIPLE, ratio=2, candidates=1)
    questions = ["Why?", "What is the moon made of?", "Hi"]
    # The greedy answer, one that is not, and one of a single token.
    view = LanguageModel(lm.model, lm.tokenizer, kind, raw=not chat)
    params = SamplingParams(max_new_tokens=4)
    best = Decoder(view).complete([Decoder(view).encode(questions[0], method, params)])[0]
    answers = [None, " Cheese", "x"]
    contexts = [[{"role": "user", "content": q}] for q in questions]
    args, expected = [], []
    for messages, answer in zip(contexts, answers, strict=True):
        branches = [encode(view, chat_) for chat_ in method.prompts(messages)]
        if answer is None:
            answer = lm.tokenizer.decode(best.token_ids)
            if lm.tokenizer(answer, add_special_tokens=False)["input_ids"] != best.token_ids:
                answer = "Z"
        tokens = lm.tokenizer(answer, add_special_tokens=False)["input_ids"]
        context = ours.apply_chat_template(messages) if chat else messages[0]["content"]
        args.append((context, answer))
        expected.append(naive(lm, branches, tokens, lambda _, z: method.combine(z)))
    found = ours.loglikelihood(instances(*args), disable_tqdm=True)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], abs=1e-3)
    assert [g for _, g in found] == [g for _, g in expected]


def test_the_greedy_flag_is_true_for_the_greedy_text_alone(harness, llama):
    """Token by token: the flag is that of the combined logits, not of one branch."""
    ours = trueline(llama, principle=PRINCIPLE, ratio=2)
    method, raw = (
        LinearAlignment(PRINCIPLE, ratio=2),
        LanguageModel(llama.model, llama.tokenizer, raw=True),
    )
    text, chars = "abc", [chr(i) for i in range(33, 127)]
    scores = ours.loglikelihood(instances(*[(text, c) for c in chars]), disable_tqdm=True)
    branches = [encode(raw, m) for m in method.prompts([{"role": "user", "content": text}])]
    rows = [torch.tensor([ids]) for ids in branches]
    with torch.inference_mode():
        z = torch.stack([llama.model(ids).logits[0, -1] for ids in rows])[None]
    best = int(method.combine(z).argmax())
    ids = [llama.tokenizer(c)["input_ids"][0] for c in chars]
    assert [greedy for _, greedy in scores] == [i == best for i in ids]
    assert any(x == float("-inf") for x, _ in scores)


def test_the_rest_branch_counts_alone_after_the_first_tokens(harness, llama):
    ours = trueline(llama, method="ada-cd", first_tokens="2", plausibility=1e-9)
    method = AdaCD(first_tokens=2, plausibility=1e-9)
    raw = LanguageModel(llama.model, llama.tokenizer, raw=True)
    branches = [encode(raw, m) for m in method.prompts([{"role": "user", "content": "Tell"}])]
    tokens = llama.tokenizer(" me it")["input_ids"]

    def combine(t, z):
        return method.combine(z) if t < 2 else z[:, method.rest_branch]

    expected = naive(llama, branches, tokens, combine)[0]
    found = ours.loglikelihood(instances(("Tell", " me it")), disable_tqdm=True)[0][0]
    assert found == pytest.approx(expected, abs=1e-3)


def test_rolling_windows_keep_the_principle_and_predict_each_token_once(harness, folder):
    ours = trueline(str(folder), principle=PRINCIPLE, ratio=1, candidates=1)
    text = "The sun was warm. " * 9
    windows, lm = list(ours._windows(text)), ours.model
    tokens = [token for w in windows for token in w.tokens]
    assert len(windows) == 2
    assert tokens == lm.tokenizer(text)["input_ids"]
    principle = lm.tokenizer(PRINCIPLE + "\n")["input_ids"]
    assert all(list(w.branches[0][: len(principle)]) == principle for w in windows)
    # The later window sees as much of the text as fits, the same in both branches.
    rows = [len(row) + len(w.tokens) - 1 for w in windows for row in w.branches]
    assert max(rows) in (127, 128)
    assert windows[1].branches[0][len(principle) :] == windows[1].branches[1][1:]
    method = LinearAlignment(PRINCIPLE, ratio=1, candidates=1)
    parts = [naive(lm, w.branches, w.tokens, lambda _, z: method.combine(z)) for w in windows]
    total = ours.loglikelihood_rolling(instances((text,)), disable_tqdm=True)[0]
    assert total == pytest.approx(sum(x for x, _ in parts), abs=1e-2)


def test_the_base_branch_runs_without_the_adapter(harness, llama):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    lm = LanguageModel(peft.get_peft_model(random_model("llama"), config), byte_tokenizer())
    lm.model.eval()
    ours = trueline(lm, method="contrast", base=True, guidance=2, batch_size=2)
    ids, tokens = lm.tokenizer("Tell")["input_ids"], lm.tokenizer(" me it")["input_ids"]
    row = torch.tensor([[*ids, *tokens[:-1]]])
    with torch.inference_mode():
        z_p = lm.model(row).logits[0, -len(tokens) :]
        with lm.model.disable_adapter():
            z_n = lm.model(row).logits[0, -len(tokens) :]
    logprobs = (z_n + 2 * (z_p - z_n)).log_softmax(-1)
    expected = float(logprobs.gather(-1, torch.tensor(tokens)[:, None]).sum())
    pairs = instances(("Tell", " me it"), ("Go", " on"))
    found = ours.loglikelihood(pairs, disable_tqdm=True)
    assert found[0][0] == pytest.approx(expected, abs=1e-3)
    with pytest.raises(ModelError, match="needs an adapter"):
        trueline(llama, method="contrast", base=True)


def test_what_does_not_fit_is_cut_from_the_context_not_from_the_principle(harness, folder):
    ours = trueline(str(folder), principle=PRINCIPLE)
    item = ours._scored("The cat sat. " * 30, "yes")
    with_principle, without = item.branches
    head = ours.model.tokenizer(PRINCIPLE + "\n")["input_ids"]
    assert list(with_principle[: len(head)]) == head
    assert with_principle[len(head) :] == without
    assert max(map(len, item.branches)) + len(item.tokens) - 1 == 128
    with pytest.raises(DataError, match="do not fit the 128 positions"):
        ours._scored("Why?", "y" * 127)


@pytest.mark.parametrize("chat", [False, True])
def test_generation_is_the_decoders(harness, llama, chat):
    ours = trueline(llama, principle=PRINCIPLE, ratio=2, batch_size=2)
    lm = LanguageModel(llama.model, llama.tokenizer, raw=not chat)
    kwargs = {"until": ["a", "e"], "max_gen_toks": 12, "do_sample": True, "temperature": 0.7}
    questions = ["Why?", "What is it?", "Who are you, and why?"]
    messages = [[{"role": "user", "content": q}] for q in questions]
    contexts = [ours.apply_chat_template(m) for m in messages] if chat else questions
    found = ours.generate_until(instances(*[(c, kwargs) for c in contexts]), disable_tqdm=True)
    params = SamplingParams(max_new_tokens=12, temperature=0.7, stop=("a", "e"))
    method = LinearAlignment(PRINCIPLE, ratio=2)
    for i, (chat_, text) in enumerate(zip(messages, found, strict=True)):
        decoder = Decoder(lm)
        prompt = decoder.encode(Request(chat_, seed=i), method, params)
        assert decoder.complete([prompt])[0].text == text


def test_generation_settings(harness):
    from trueline.integrations.lm_eval import sampling_params

    assert sampling_params({"until": "\n", "max_new_tokens": 5}) == SamplingParams(5, stop=("\n",))
    assert sampling_params({"do_sample": False, "temperature": 0.5}).greedy
    assert sampling_params({"do_sample": True}).temperature == 1
    assert sampling_params({"do_sample": True, "temperature": 0.0}).greedy
    assert sampling_params({"temperature": 0.5, "top_p": 0.9}).top_p == 0.9
    with pytest.raises(ConfigError, match="`num_beams`"):
        sampling_params({"num_beams": 2})


def test_options_convert_and_misspelt_ones_are_refused():
    method, load = split_options({"principle": 7, "ratio": "3", "norm": "inf", "dtype": "float32"})
    assert method == LinearAlignment("7", ratio=3, norm=float("inf"))
    assert load == {"dtype": "float32"}
    assert split_options({})[0].name == "plain"
    assert split_options({"method": "contrast", "base": "true"})[0].base is True
    assert split_options({"method": "self-cd", "first_tokens": "3"})[0].first_tokens == 3
    for options, text in [
        ({"principel": "x"}, 'Did you mean "principle"'),
        ({"method": "linear-aligment"}, 'Did you mean "linear-alignment"'),
        ({"method": "self-cd", "ratio": 2}, "has no option `ratio`"),
        ({"principle": "x", "ratio": "two"}, "`ratio` must be a number, got 'two'"),
        ({"principle": "x", "ratio": 1, "epsilon": 1}, "not both"),
        ({"method": "contrast", "base": "yes"}, "`base` must be true or false"),
        ({"raw": True}, "Leave `raw` out"),
    ]:
        with pytest.raises(ConfigError, match=text):
            split_options(options)


CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
UNTIL = """
task: local_until
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Three local tasks on four rows: no hub."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"question": f"Which one comes {i}?", "choices": [" this", " that"], "answer": i % 2}
        for i in range(4)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in (("choice", CHOICE), ("until", UNTIL), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


NAMES = ["local_choice", "local_until", "local_rolling"]


@pytest.mark.parametrize("chat", [False, True])
def test_tasks_run(harness, folder, tasks, chat):
    from lm_eval.tasks import TaskManager

    import trueline.integrations.lm_eval  # noqa: F401 registers the model

    options = {"pretrained": str(folder), "principle": PRINCIPLE, "ratio": 1, "candidates": 1}
    results = harness.simple_evaluate(
        model="trueline",
        model_args=options,
        tasks=NAMES,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        apply_chat_template=chat,
        num_fewshot=0,
        batch_size=2,
        bootstrap_iters=0,
        system_instruction="Answer." if chat else None,
    )
    assert set(results["results"]) == set(NAMES)
    assert 0 <= results["results"]["local_choice"]["acc,none"] <= 1
    assert 1 < results["results"]["local_rolling"]["word_perplexity,none"] < float("inf")
    assert "LinearAlignment" in results["config"]["decoding_method"]
    texts = [sample["resps"][0][0] for sample in results["samples"]["local_until"]]
    assert all(isinstance(text, str) and "\n" not in text for text in texts)


@pytest.mark.slow  # the harness reads all of its own tasks first
def test_the_command_line(harness, folder, tasks):
    words = ["lm_eval", "run", "--model", "trueline", "--tasks", "local_choice", "--model_args"]
    words += [f"pretrained={folder}", "principle=Don't ramble, be brief.", "ratio=2"]
    words += ["--include_path", str(tasks)]
    module = "trueline.integrations.lm_eval"
    run = Process(code=f"import sys, runpy; sys.argv = {words}; "
                  f"runpy.run_module({module!r}, run_name='__main__')")  # fmt: skip
    assert run.wait() == 0, run.said
    assert "|local_choice|" in run.said


def test_a_misspelt_option_ends_the_command_line(harness, monkeypatch, capsys):
    import lm_eval.__main__

    from trueline.integrations.lm_eval import TruelineLM, main

    options = {"principel": "x"}
    create = lambda: TruelineLM.create_from_arg_obj(options, {"batch_size": 1})  # noqa: E731
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", create)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    message = 'error: Unknown option `principel`. Did you mean "principle"?'
    assert message in capsys.readouterr().err


@pytest.fixture
def inspect_harness():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = "inspect-ai is not installed: pip install 'trueline[inspect]'"
        return pytest.importorskip("inspect_ai", reason=reason)


def test_inspect_decodes_under_the_method(inspect_harness, folder, tmp_path):
    from inspect_ai import Task
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.scorer import includes

    questions = ["Why?", "What is the moon made of?", "Who are you?"]
    config = GenerateConfig(max_tokens=8, temperature=0.7, seed=5, stop_seqs=["e"])
    name = f"trueline/{folder}"
    model = get_model(name, principle=PRINCIPLE, ratio=2, dtype="float32", config=config)
    task = Task(dataset=[Sample(input=q, target="x") for q in questions], scorer=includes())
    logs = inspect_harness.eval(
        task, model=model, log_dir=str(tmp_path), display="none", fail_on_error=True
    )
    assert logs[0].status == "success", logs[0].error
    found = {s.input: s.output.completion for s in logs[0].samples}
    params = SamplingParams(max_new_tokens=8, temperature=0.7, stop=("e",))
    lm, method = load_model(folder), LinearAlignment(PRINCIPLE, ratio=2)
    for question in questions:
        expected = generate(lm, [Request(question, seed=5)], method, params)[0].text
        assert found[question] == expected
    with pytest.raises(ConfigError, match="Did you mean"):
        get_model(name, principel="x", memoize=False)
