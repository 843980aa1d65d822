"""LoRA files against diffusers and peft, both ways: forward within 1e-5 of the largest, in float32."""

import json
import re
import shutil

import pytest
import torch
from diffusers import WanPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from sample.lora import WEIGHTS, apply_lora, lora_step
from sample.model import load_model
from sample.pipeline import TextToVideo
from train.config_recipes import LoRAConfig
from train.lora import add_adapters, export_lora


def inputs(channels=4):
    generator = torch.Generator().manual_seed(3)
    x_t = torch.randn(2, channels, 2, 4, 6, generator=generator)
    return x_t, torch.tensor([0.3, 0.9]), torch.randn(2, 7, 16, generator=generator)


@torch.no_grad()
def ours(dit):
    return dit(*inputs())


@torch.no_grad()
def theirs(transformer):
    x_t, t, context = inputs()
    return transformer(x_t, 1000 * t, context, return_dict=False)[0]


def assert_close(got, expected, base):
    """Within 1e-5 of the largest value, and far from what the model says without the LoRA."""
    scale = expected.abs().max()
    assert (expected - base).abs().max() > 1e-2 * scale
    torch.testing.assert_close(got, expected, atol=1e-5 * scale.item(), rtol=0)


@torch.no_grad()
def randomise(module):
    """Adapters that do something: B starts at zero."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def complaint(zoetrope, wan_folders, capsys):
    """The one line that sampling with a LoRA ends in."""

    def run(*flags):
        folder = wan_folders("t2v")[1]
        capsys.readouterr()  # what diffusers says while it saves
        code, _, errors = zoetrope("sample", folder, "a fox", *flags)
        assert (code, len(errors.splitlines())) == (2, 1), errors
        return errors

    return run


@pytest.fixture
def adapted(wan_folders):
    """A function to a DiT with random adapters, and its LoRAConfig."""

    def make(**options):
        config = LoRAConfig(rank=3, **options)
        dit = load_model(wan_folders("t2v")[1]).dit
        add_adapters(dit, config)
        randomise(dit)
        return dit, config

    return make


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 6}, {"alpha": 1.5, "targets": ("q", "mlp")}, {"targets": ("v", "out")}],
)
def test_ours_in_diffusers_and_here(wan_folders, adapted, tmp_path, options):
    reference, model = wan_folders("t2v")
    dit, config = adapted(**options)
    export_lora(tmp_path, dit, config, {"provenance": {"step": 1}})
    pipeline = WanPipeline.from_pretrained(reference)
    base = theirs(pipeline.transformer)
    pipeline.load_lora_weights(tmp_path)
    expected = theirs(pipeline.transformer)
    assert_close(ours(dit), expected, base)
    merged = load_model(model).dit
    apply_lora(merged, tmp_path)
    assert_close(ours(merged), expected, base)


def test_scale(wan_folders, adapted, tmp_path):
    reference, model = wan_folders("t2v")
    export_lora(tmp_path, *adapted(alpha=6), {})
    pipeline = WanPipeline.from_pretrained(reference)
    base = theirs(pipeline.transformer)
    pipeline.load_lora_weights(tmp_path, adapter_name="fox")
    pipeline.set_adapters("fox", 0.5)
    dit = load_model(model).dit
    apply_lora(dit, tmp_path / WEIGHTS, 0.5)
    assert_close(ours(dit), theirs(pipeline.transformer), base)
    unchanged = load_model(model).dit
    apply_lora(unchanged, tmp_path, 0)
    assert torch.equal(ours(unchanged), ours(load_model(model).dit))


THEIR_CONFIGS = {
    "as the training scripts": dict(
        r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]
    ),
    "every linear layer": dict(
        r=2,
        lora_alpha=1,
        target_modules=["ffn.net.0.proj", "ffn.net.2", "patch_embedding", "proj_out", "linear_1"],
    ),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=["to_q", "to_v"],
        rank_pattern={"attn1.to_q": 2},
        alpha_pattern={"blocks.1.attn2.to_v": 3},
    ),
    "rslora": dict(r=4, lora_alpha=8, target_modules=["to_k"], use_rslora=True),
}


@pytest.mark.parametrize("name", THEIR_CONFIGS)
@pytest.mark.parametrize("metadata", [True, False])
def test_theirs_here(wan_folders, tmp_path, name, metadata):
    """Without its settings in the header a file's factor is 1, here as in diffusers."""
    reference, model = wan_folders("t2v")
    pipeline = WanPipeline.from_pretrained(reference)
    base = theirs(pipeline.transformer)
    pipeline.transformer.add_adapter(LoraConfig(**THEIR_CONFIGS[name]), adapter_name="default")
    randomise(pipeline.transformer)
    settings = _collate_lora_metadata({"transformer": pipeline.transformer}) if metadata else {}
    weights = get_peft_model_state_dict(pipeline.transformer)
    WanPipeline.save_lora_weights(tmp_path, transformer_lora_layers=weights, **settings)
    again = WanPipeline.from_pretrained(reference)
    again.load_lora_weights(tmp_path)
    expected = theirs(again.transformer)
    if metadata:
        assert torch.equal(expected, theirs(pipeline.transformer))
    dit = load_model(model).dit
    apply_lora(dit, tmp_path)
    assert_close(ours(dit), expected, base)


def test_pefts_own_folder(wan_folders, tmp_path):
    reference, model = wan_folders("t2v")
    transformer = WanPipeline.from_pretrained(reference).transformer
    base = theirs(transformer)
    wrapped = get_peft_model(transformer, LoraConfig(**THEIR_CONFIGS["as the training scripts"]))
    randomise(wrapped)
    wrapped.save_pretrained(tmp_path)
    dit = load_model(model).dit
    apply_lora(dit, tmp_path)
    assert_close(ours(dit), theirs(wrapped), base)


def test_two_experts(wan_folders, adapted, complaint, tmp_path):
    """Each has its own; what one is given leaves the other as it was."""
    export_lora(tmp_path / "lora", *adapted(), {})
    folder = wan_folders("a14b")[1]
    plain = TextToVideo.from_folder(folder, "cpu", dtype=torch.float32)
    for option, changed in (("lora", [True, False]), ("lora_low", [False, True])):
        loras = {option: [(tmp_path / "lora", 1.0)]}
        pipeline = TextToVideo.from_folder(folder, "cpu", dtype=torch.float32, **loras)
        pairs = zip(pipeline.experts, plain.experts)
        assert [not torch.equal(ours(a), ours(b)) for a, b in pairs] == changed
    line = complaint("--lora-low", tmp_path / "lora")
    assert f"--lora-low {tmp_path / 'lora'}: this model has no low-noise expert" in line


def test_sampling_with_a_lora(wan_folders, adapted, zoetrope, tmp_path):
    export_lora(tmp_path / "lora", *adapted(), {})
    videos = []
    for name, options in (("plain", []), ("none", [":0"]), ("half", [":0.5"]), ("whole", [""])):
        out = tmp_path / f"{name}.mp4"
        flags = [f"--lora={tmp_path / 'lora'}{scale}" for scale in options]
        model = wan_folders("t2v")[1]
        code, _, errors = zoetrope("sample", model, "a fox", "--steps", 2, "-o", out, *flags)
        assert code == 0, errors
        videos.append(out.read_bytes())
    assert videos[0] == videos[1]
    assert len(set(videos)) == 3


def other_names(weights):
    return {name.replace("to_q", "to_queries"): value for name, value in weights.items()}


def other_width(weights):
    return {
        name: value[:, :-1].contiguous() if "lora_A" in name else value
        for name, value in weights.items()
    }


def more_blocks(weights):
    return {name.replace("blocks.1.", "blocks.7."): value for name, value in weights.items()}


def half_missing(weights):
    return {name: value for name, value in weights.items() if "lora_B" not in name}


def other_kind(weights):
    return {name.replace("lora_A.weight", "hada_w1_a"): value for name, value in weights.items()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_names, "a LoRA of another model: this one has no layer blocks.0.attn1.to_queries"),
        (other_width, "a LoRA of another model: its blocks.0.attn1.to_k is 48x47 of rank 3, this"),
        (more_blocks, "a LoRA of another model: this one has no layer blocks.7."),
        (half_missing, "has no lora_B; the file is incomplete"),
        (other_kind, "not a LoRA as diffusers writes it: it has transformer.blocks.0.attn1."),
        (lambda weights: {}, "there is nothing in it"),
    ],
)
def test_another_models(wan_folders, adapted, complaint, tmp_path, damage, message):
    folder = wan_folders("t2v")[1]
    export_lora(tmp_path, *adapted(), {})
    save_file(damage(load_file(tmp_path / WEIGHTS)), tmp_path / WEIGHTS)
    assert message in complaint("--lora", tmp_path)
    dit = load_model(folder).dit
    with pytest.raises(ValueError, match=r"LoRA|lora|nothing"):
        apply_lora(dit, tmp_path)
    fresh = load_model(folder).dit.state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in dit.state_dict().items())


def test_files_that_are_none(adapted, complaint, tmp_path):
    export_lora(tmp_path / "lora", *adapted(), {})
    (tmp_path / "empty").mkdir()
    shutil.copytree(tmp_path / "lora", tmp_path / "cut")
    path = tmp_path / "cut" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    for name, message in (
        ("none", "no such file or folder; expected a LoRA"),
        ("empty", f"no {WEIGHTS} in it; expected a LoRA"),
        ("cut", "not a whole safetensors file"),
        ("lora:inf", "the scale must be a finite number"),
    ):
        assert message in complaint("--lora", tmp_path / name)


def assert_refused(wan_folders, folder, message):
    """In one line that names the file, and the model is as it was."""
    model = wan_folders("t2v")[1]
    dit, fresh = load_model(model).dit, load_model(model).dit.state_dict()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        apply_lora(dit, folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, fresh[name]) for name, value in dit.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "(Expecting"),
        ([1], "got [1], expected names and values"),
        ([], "got [], expected names and values"),
        ({"lora_alpha": [8]}, "lora_alpha: got [8], expected a number"),
        ({"lora_alpha": {"a": 1}}, "lora_alpha: got {'a': 1}, expected a number"),
        ({"lora_alpha": "abc"}, "lora_alpha: got 'abc', expected a number"),
        ({"lora_alpha": True}, "lora_alpha: got True, expected a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha: got nan, expected a number"),
        ({"lora_alpha": 10**400}, "expected a number"),
        ({"alpha_pattern": {"to_q": None}}, "to_q: got None, expected a number"),
        ({"alpha_pattern": ["to_q"]}, "alpha_pattern is ['to_q'], expected numbers by layers'"),
        ({"alpha_pattern": "to_q"}, "alpha_pattern is 'to_q', expected numbers by layers' names"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern '(' is not a regular expression"),
        ({"use_rslora": "false"}, "use_rslora: got 'false', expected true or false"),
        ("[" * 100_000, "recursion"),
    ],
)
@pytest.mark.parametrize("beside", [False, True], ids=["header", "beside"])
def test_settings_that_cannot_be_read(wan_folders, adapted, tmp_path, settings, message, beside):
    text = settings if isinstance(settings, str) else json.dumps(settings)
    export_lora(tmp_path, *adapted(), {})
    weights = load_file(tmp_path / WEIGHTS)
    if beside:
        (tmp_path / WEIGHTS).unlink()
        save_file(weights, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(text)
    else:
        save_file(weights, tmp_path / WEIGHTS, metadata={"lora_adapter_metadata": text})
    assert_refused(wan_folders, tmp_path, "its LoRA settings cannot be read")
    assert_refused(wan_folders, tmp_path, message)


LAYER, F4 = "transformer.blocks.1.attn2.to_v", torch.float4_e2m1fn_x2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({".alpha": torch.zeros(0)}, "alpha is []; expected one number"),
        ({".alpha": torch.ones(2)}, "alpha is [1.0, 1.0]; expected one number"),
        ({".alpha": torch.tensor(float("inf"))}, "alpha is [inf]; expected one number"),
        (
            {".lora_A.weight": torch.zeros(0, 48), ".lora_B.weight": torch.zeros(48, 0)},
            "blocks.1.attn2.to_v's lora_A is of rank 0, its lora_B of rank 0; expected the same",
        ),
        ({".lora_A.weight": torch.zeros(4, 48)}, "lora_A is of rank 4, its lora_B of rank 3"),
        ({".lora_A.weight": torch.tensor(1.0)}, "lora_A is torch.float32 (); expected a matrix"),
        ({".lora_A.weight": torch.ones(3)}, "lora_A is torch.float32 (3,); expected a matrix"),
        ({".lora_B.weight": torch.ones(48)}, "lora_B is torch.float32 (48,); expected a matrix"),
        ({".lora_B.weight": torch.ones(48, 3).int()}, "lora_B is torch.int32 (48, 3); expected"),
        ({".lora_B.weight": torch.ones(48, 3).byte().view(F4)}, "lora_B is torch.float4_e2m1fn_x2"),
    ],
)
def test_tensors_that_make_no_sense(wan_folders, adapted, tmp_path, changes, message):
    export_lora(tmp_path, *adapted(), {})
    weights = load_file(tmp_path / WEIGHTS)
    weights.update({f"{LAYER}{kind}": value for kind, value in changes.items()})
    save_file(weights, tmp_path / WEIGHTS)
    assert_refused(wan_folders, tmp_path, message)


def entry(**changes):
    """A header's change to its first tensor; None takes a value out."""

    def change(header):
        first = next(name for name in header if name != "__metadata__")
        header[first].update(changes)
        header[first] = {k: v for k, v in header[first].items() if v is not None}

    return change


@pytest.mark.parametrize(
    "change",
    [
        entry(shape=None),
        entry(dtype=None),
        entry(dtype="F33"),
        entry(dtype=7),
        entry(shape=[1, 1]),
        entry(shape=[-3, -48]),
        entry(shape="3x48"),
        entry(data_offsets=[4, 8]),
        entry(data_offsets=[8, 4]),
        lambda header: header.update(__metadata__={"format": 1}),
        lambda header: header.update(__metadata__=[1]),
    ],
)
def test_headers_that_lie(wan_folders, adapted, tmp_path, change):
    export_lora(tmp_path, *adapted(), {})
    raw = (tmp_path / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (tmp_path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    assert_refused(wan_folders, tmp_path, "safetensors file")


@pytest.mark.parametrize(
    ("option", "expert", "kind", "warned"),
    [
        ("lora", "low", "a14b", True),
        ("lora_low", "high", "a14b", True),
        ("lora", "high", "a14b", False),
        ("lora_low", "low", "a14b", False),
        ("lora", None, "a14b", False),
        ("lora", "low", "t2v", False),
    ],
)
def test_a_lora_of_the_other_expert(
    wan_folders, adapted, tmp_path, caplog, option, expert, kind, warned
):
    export_lora(tmp_path, *adapted(), {} if expert is None else {"expert": expert})
    TextToVideo.from_folder(wan_folders(kind)[1], "cpu", **{option: [(tmp_path, 1.0)]})
    assert len(caplog.messages) == warned
    if warned:
        flags = {"lora": "--lora", "lora_low": "--lora-low"}
        assert caplog.messages[0].startswith(
            f"{flags[option]} {tmp_path}: trained for the {expert}"
        )


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "provenance: 3", "when: 2020-99-99", "\xff"])
def test_what_a_damaged_lora_yaml_says(tmp_path, text):
    (tmp_path / "lora.yaml").write_text(text, encoding="latin-1")
    assert lora_step(tmp_path) is None
