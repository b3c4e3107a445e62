"""Clients of text, exported and used: what transformers and peft open is what trained, and prompts go on as it says."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedmoe import export, mixture, textexport, textserving
from fedmoe.config import Config, Data, Gate, Model
from fedmoe.errors import UsageError, UserError
from fedmoe.mixture import Mixture
from fedmoe.models.language import Body
from fedmoe.textserving import Card, Served, generate
from fedmoe.tokenizer import open_tokenizer
from tests.support import Fedmoe, train

transformers = pytest.importorskip("transformers")

T, V, END = 12, 257, 256
X = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a client with embeddings apart from its head, and of one whose head they are."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text").mkdir()
    for name in "ab":
        (folder / "text" / name).write_text(f"what {name} says of clients, experts and gates; " * 40)
    words = ["--data.kind=text", "--data.name=text", f"--data.sequence_length={T}", "--partition.kind=iid"]
    words += ["--model.local", "llama-nano", "qwen-nano", "--model.global_expert=llama-nano", "--training.lr=0.1"]
    words += ["--federation.clients=2", "--federation.rounds=1", "--run.threads=1", "--run.no-report"]
    return train(folder, *words, "--data.limit=64", "--engine.kind=reference")


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    """The export of client 1."""
    export.run(run, 1, [], False, run.parent / "exported")
    return run.parent / "exported"


def served(name: str = "llama-nano", method: Any = "fedmoe", shared: str = "llama-nano", **fields: Any) -> Served:
    """A model none of whose parameters that train is as it began."""
    config = Config(
        method=method,
        data=Data(kind="text", name="stdlib", sequence_length=T),
        model=Model(local=(name,), global_expert=shared, adapter="linear", **fields),
        gate=Gate(norm="layer-none-layer"),
    )
    tokenizer = open_tokenizer("bytes")
    model = mixture.build(config, 0, (T,), V)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    theta: Any = "none" if method == "local" else "own"
    known: Any = {"vocabulary": V, "config": config}
    return textserving._served(Card(client=3, round=7, theta=theta, **known), model, tokenizer)


def written(one: Served, folder: Path) -> Path:
    folder.mkdir()
    textexport.write(one, folder, folder)
    return folder


def logits(model: Mixture) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(X)
    return out


def whole(model: Mixture) -> Any:
    """The local expert with its head, as transformers knows it."""
    body = model.local_expert
    assert isinstance(body, Body)
    return body.whole


def of(model: Any) -> Tensor:
    """Logits as transformers computes them."""
    with torch.no_grad():
        out: Tensor = model.eval()(input_ids=X, use_cache=False).logits
    return out


def greedy(one: Served, start: Sequence[int], count: int) -> list[int]:
    """What `generate` must give, from the whole mixture's logits of all tokens."""
    tokens = list(start)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(one.model(torch.tensor(tokens[-T:])[None])[0, -1].argmax()))
    return tokens[len(start) :]


@pytest.mark.parametrize("client", [0, 1])
def test_a_client_of_a_run_is_the_same_from_its_export_and_in_transformers(
    run: Path, client: int, tmp_path: Path
) -> None:
    out, trained = tmp_path / "out", textserving.from_run(run, client)
    export.run(run, client, [], False, out)
    again = textserving.from_export(out)
    assert torch.equal(logits(again.model), logits(trained.model))
    assert replace(again.card, config=trained.card.config, files=()) == trained.card
    assert (again.card.client, again.card.round, again.card.theta) == (client, 1, "own")
    assert again.card.config.data.sequence_length == T
    opened = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(of(opened), of(whole(trained.model)))
    assert opened.config.tie_word_embeddings == (client == 1) and opened.config.vocab_size == V
    assert (opened.get_input_embeddings().weight is opened.get_output_embeddings().weight) == (client == 1)
    tokenizer, text = transformers.AutoTokenizer.from_pretrained(out), "Grüße,\n\tclient 3 <- €"
    assert tokenizer(text).input_ids == trained.tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text and tokenizer.eos_token_id == END
    listed = {entry.file for entry in again.card.files} | {"fedmoe.json"}
    assert listed == {path.name for path in out.iterdir()}


def test_formats_of_images_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--format is for models of images: text is exported for transformers"):
        export.run(run, 1, ["onnx"], False, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_with_the_aggregated_global_expert(run: Path, exported: Path, tmp_path: Path) -> None:
    export.run(run, 1, [], True, tmp_path / "out")
    ours, theirs = textserving.from_run(run, 1, True), textserving.from_export(tmp_path / "out")
    assert theirs.card.theta == "aggregated" and torch.equal(logits(ours.model), logits(theirs.model))
    own = textserving.from_export(exported)
    assert not torch.equal(logits(own.model), logits(theirs.model))
    assert torch.equal(of(whole(own.model)), of(whole(theirs.model)))


@pytest.mark.parametrize("name", ["gpt2-nano", "gemma-nano"])
def test_any_family_is_read_back_to_the_bit(tmp_path: Path, name: str) -> None:
    one = served(name, "static" if name == "gpt2-nano" else "fedmoe")
    again = textserving.from_export(written(one, tmp_path / "out"))
    assert torch.equal(logits(again.model), logits(one.model))
    assert torch.equal(of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")), of(whole(one.model)))


@pytest.mark.parametrize(("name", "dtype"), [("llama-nano", "fp32"), ("gpt2-nano", "bf16"), ("qwen-nano", "fp32")])
def test_adapters_are_pefts_and_their_base_lies_beside(tmp_path: Path, name: str, dtype: str) -> None:
    peft = pytest.importorskip("peft")
    one = served(name, tune="lora", lora_rank=2, frozen_dtype=dtype)
    folder = written(one, tmp_path / "out")
    assert torch.equal(logits(textserving.from_export(folder).model), logits(one.model))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    assert not torch.equal(of(base), of(whole(one.model)))
    assert torch.equal(of(peft.PeftModel.from_pretrained(base, folder)), of(whole(one.model)))
    if dtype == "fp32":
        assert torch.equal(of(transformers.AutoModelForCausalLM.from_pretrained(folder)), of(whole(one.model)))


def test_adapters_of_a_model_of_the_hub_name_it(tmp_path: Path) -> None:
    one = served(tune="lora")
    model = replace(one.card.config.model, local=("hf/some/model",))
    card = replace(one.card, config=replace(one.card.config, model=model))
    folder = written(replace(one, card=card), tmp_path / "out")
    assert not (folder / "base").exists()
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"


@pytest.mark.parametrize("tune", ["full", "frozen", "lora"])
def test_an_export_needs_none_of_the_folders_its_models_came_from(tmp_path: Path, tune: str) -> None:
    for name, family in (("local", "llama"), ("shared", "gpt2")):
        written(served(f"{family}-nano", "local"), tmp_path / name)
    one = served(f"hf/{tmp_path / 'local'}", shared=f"hf/{tmp_path / 'shared'}", tune=tune, frozen_dtype="bf16")
    expected = logits(one.model)
    written(one, tmp_path / "out")
    shutil.rmtree(tmp_path / "local")
    shutil.rmtree(tmp_path / "shared")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert torch.equal(logits(textserving.from_export(tmp_path / "elsewhere").model), expected)


def test_greedy_tokens_are_the_mixtures_most_probable_ones() -> None:
    one = served("qwen-nano")
    prompt = "a prompt longer than a window"
    made = generate(one, prompt, 20)
    assert made.tokens == greedy(one, prompt.encode(), len(made.tokens)) and len(set(made.tokens)) > 1
    assert len(made.tokens) == 20 or made.tokens[-1] == END
    short = generate(one, "abc", 6)
    x = torch.tensor([*b"abc", *short.tokens])[None]
    with torch.no_grad():
        losses = F.cross_entropy(one.model(x)[0, 2:-1], x[0, 3:], reduction="none")
        weights = one.model.weights(x)[0, 2:-1, 0]
    assert short.log_probability == pytest.approx(-float(losses.sum()), abs=1e-4)
    assert short.weight == pytest.approx(float(weights.mean()), abs=1e-5)
    assert short.text == one.tokenizer.decode(short.tokens)


def test_alone_it_goes_on_as_transformers_does_and_stops_where_that_does(tmp_path: Path) -> None:
    one = served(method="local")
    tokens, header = generate(one, "ab", T - 2).tokens, one.model.header
    assert isinstance(header, torch.nn.Linear)
    with torch.no_grad():
        state = one.model.local_expert(torch.tensor([*b"ab", *tokens[:5]])[None])[0, -1]
        for scale in (0, 3):  # at 3 the end token comes after five others at the latest
            header.weight[END] = scale * header.weight[tokens[5]].norm() * state / state.norm()
            folder = written(one, tmp_path / str(scale))
            made = generate(textserving.from_export(folder), "ab", T - 2)
            opened = transformers.AutoModelForCausalLM.from_pretrained(folder)
            theirs = opened.generate(torch.tensor([list(b"ab")]), do_sample=False, max_new_tokens=T - 2)
            assert theirs[0, 2:].tolist() == made.tokens == greedy(one, b"ab", len(made.tokens))
            assert (len(made.tokens) < T - 2 and made.tokens[-1] == END) == (scale == 3)
            assert made.weight == 0 and "\ufffd<|" not in made.text
    assert generate(one, "", 1).tokens == greedy(one, [END], 1)


def test_drawn_tokens_are_the_seeds() -> None:
    one = served()
    first, again, other = (generate(one, "x", 10, 1.0, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert generate(one, "x", 10, 1e-9) == generate(one, "x", 10)


def test_odd_prompts_and_models() -> None:
    one = served()
    with pytest.raises(UserError, match="half of a character: repair or remove it"):
        generate(one, "a\udcff", 1)
    with torch.no_grad():
        next(one.model.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="client 3: the model's logits are not finite: it has diverged"):
        generate(one, "a", 1)


def card(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """The card with something in it changed."""

    def write(folder: Path) -> None:
        content = json.loads((folder / "fedmoe.json").read_text())
        change(content)
        (folder / "fedmoe.json").write_text(json.dumps(content))

    return write


def weights(**fields: object) -> Callable[[Path], object]:
    """The card with what it says of model.safetensors changed."""
    return card(lambda c: next(entry for entry in c["files"] if entry["file"] == "model.safetensors").update(fields))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda f: (f / "fedmoe.json").write_text("{"), r"fedmoe.json: does not describe an export \(JSONDecodeError"),
        (lambda f: (f / "fedmoe.json").write_bytes(b"\xff"), "fedmoe.json: does not describe an export"),
        (lambda f: (f / "fedmoe.json").write_text("[" * 10**5), "fedmoe.json: does not describe .*Recursion"),
        (card(lambda c: c.update(format=2)), "fedmoe.json: format 2, this version reads 1"),
        (card(lambda c: c.update(more=1)), "fedmoe.json: does not describe an export .*'more'"),
        (card(lambda c: c.pop("theta")), "fedmoe.json: does not describe an export .*'theta'"),
        (card(lambda c: c.update(theta="mine")), "fedmoe.json: does not describe an export .*theta 'mine'"),
        (card(lambda c: c.update(theta=[])), "fedmoe.json: does not describe an export"),
        (card(lambda c: c.update(vocabulary=0)), "fedmoe.json: does not describe an export .*vocabulary 0"),
        (card(lambda c: c.update(vocabulary=5)), "tokenizer.json: is not .*, it has 257 tokens, fedmoe.json says 5"),
        (card(lambda c: c.update(files=[])), "fedmoe.json: does not describe an export .*no config.json"),
        (card(lambda c: c.update(files=c["files"] * 2)), "fedmoe.json: does not describe .*file 'config.json'"),
        (weights(file="../x"), "fedmoe.json: does not describe an export .*'../x'"),
        (weights(file="/x"), "fedmoe.json: does not describe an export .*'/x'"),
        (weights(file=3), "fedmoe.json: does not describe an export"),
        (weights(sha256=None), "fedmoe.json: does not describe an export"),
        (weights(bytes=1), "model.safetensors: size is .* fedmoe.json says 1"),
        (card(lambda c: c["config"]["gate"].update(hidden=7)), "mixture.safetensors: tensor 'gate.fc1.bias' is"),
        (card(lambda c: c["config"]["gate"].update(norm="x")), "fedmoe.json: gate.norm is"),
        (card(lambda c: c["config"]["model"].update(local=["a", "b"])), "fedmoe.json: does not .* 2 models of text"),
        (card(lambda c: c["config"]["model"].update(global_expert="llama-x")), "'llama-x' is none of"),
        (
            card(lambda c: c["config"]["data"].update(kind="images")),
            'fedmoe.json: .* "stdlib" with data.kind = "images"',
        ),
        (card(lambda c: c["config"]["data"].update(sequence_length=99)), "has 12 positions, .*sequence_length is 99"),
    ],
)
def test_damage_to_the_card(exported: Path, tmp_path: Path, damage: Callable[[Path], object], line: str) -> None:
    folder = tmp_path / "out"
    shutil.copytree(exported, folder)
    damage(folder)
    with pytest.raises(UserError, match=line) as caught:
        textserving.from_export(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_damage_to_each_other_file(tmp_path: Path, tune: str) -> None:
    folder = written(served(tune=tune), tmp_path / "out")
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "fedmoe.json"]
    assert len(paths) == {"full": 6, "lora": 8}[tune]
    for path in paths:
        content = path.read_bytes()
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        for changed, said in ((None, r"cannot be read \(No"), (content[:-1], "size is"), (flipped, "SHA-256 is")):
            path.unlink() if changed is None else path.write_bytes(changed)
            with pytest.raises(UserError, match=f"{path.name}: {said}") as caught:
                textserving.from_export(folder)
            assert "\n" not in str(caught.value)
        path.write_bytes(content)
    textserving.from_export(folder)


def test_prompts_on_the_command_line(run: Path, exported: Path, tmp_path: Path, fedmoe: Fedmoe) -> None:
    (tmp_path / "prompt.txt").write_text("what")
    (tmp_path / "bad.txt").write_bytes(b"what\xff")
    words = ("predict", exported, "--prompt", "gates", "--tokens", 5, "--prompt", "", "--json")
    done = fedmoe(*words, "prompt.txt", "bad.txt", "none.txt")
    assert done.code == 1
    assert done.err == (
        "fedmoe: error: bad.txt: byte 4 is not UTF-8: convert or remove it\n"
        "fedmoe: error: none.txt: cannot be read (No such file or directory): name a text file, or give a text "
        "with --prompt\n"
    )
    lines = [json.loads(line) for line in done.out.splitlines()]
    one = textserving.from_export(exported)
    assert [line["prompt"] for line in lines] == ["gates", "", "what"]
    for line in lines:
        made = generate(one, line["prompt"], 5)
        assert line["tokens"] == made.tokens and line["text"] == made.text
        assert line["log_probability"] == pytest.approx(made.log_probability, abs=1e-4)
        assert line["weights"] == pytest.approx({"global": made.weight, "local": 1 - made.weight}, abs=1e-5)
    shown = fedmoe("predict", run, "--client", 1, "--prompt", "gates\x1b[1m", "--prompt", "what", "--tokens", 5)
    assert shown.code == 0 and not shown.err
    assert shown.out.startswith("gates\\x1b[1m") and f"\n\nwhat{lines[2]['text']}" in shown.out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("predict out", 'no prompt: give one with --prompt, "" to begin anew, or name text files'),
        ("predict out --prompt=a --top=3", "--top is for models of images, out is one of text: leave it out"),
        ("predict out --prompt=a --client=1", "out is an export of one client: leave --client out"),
        ("predict run --prompt=a", "run is a run, whose clients each have a model: say which with --client"),
        ("predict out --prompt=a --tokens=0", "--tokens is 0, must be at least 1"),
        ("predict out --prompt=a --temperature=-1", "--temperature is -1.0, must be a finite number from 0"),
        ("predict out --prompt=a --temperature=nan", "--temperature is nan, must be a finite number"),
        ("predict out --prompt=a --seed=1", "--seed has no effect with temperature 0"),
        ("predict images a.png --prompt=a", "--prompt is for models of text, images is one of images: leave it out"),
        ("predict images a.png --seed=0", "--seed is for models of text, images is one of images: leave it out"),
        ("predict images", "no images: name image files, or folders of some"),
        ("predict images --colour", "unrecognized arguments: --colour"),
    ],
)
def test_what_cannot_be_meant(run: Path, exported: Path, tmp_path: Path, fedmoe: Fedmoe, words: str, line: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "config.json").write_text("{}")
    (tmp_path / "run").symlink_to(run)
    (tmp_path / "out").symlink_to(exported)
    assert re.search(re.escape(line), fedmoe(*words.split()).one_line(2))
