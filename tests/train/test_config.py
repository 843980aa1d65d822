"""Reading configs: good ones, and one clear line for every mistake."""

import pytest
import yaml
from pydantic import ValidationError

from train.config import RunConfig, differing_key
from train.config_file import ConfigError, dump_config, load_config
from train.config_recipes import DiTSection


@pytest.fixture
def write(room, tmp_path):
    def write_config(kind="dit", **changes):
        return room.write(tmp_path / "run", kind, **changes)

    return write_config


def problem(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix(f"{path}: ")


def test_resolved_config_reads_back_the_same(write, tmp_path):
    config = load_config(write(), ["train.optimizer.betas=[0.9, 0.95]", "train.steps=7"])
    assert config.train.steps == 7
    assert config.train.optimizer.betas == (0.9, 0.95)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(config))
    assert load_config(resolved) == config
    assert load_config(resolved).hash() == config.hash()


def test_overrides_reach_optional_sections_and_floats_without_a_dot(write):
    config = load_config(write(), ["train.ema.decay=0.5", "train.optimizer.lr=3e-4"])
    assert config.train.ema.decay == 0.5
    assert config.train.optimizer.lr == 3e-4


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batch_size=-1", "train.batch_size: got -1, expected greater than 0"),
        ("logging.guidance=-1", "logging.guidance: got -1, expected greater than or equal to 0"),
        ("train.batchsize=4", "train.batchsize: unknown key; did you mean batch_size?"),
        ("trian.steps=4", "trian: unknown key; did you mean train?"),
        ("recipe.caption_dropuot=0", "recipe.caption_dropuot: unknown key; did you mean caption"),
        ("recipe.dit.dims=8", "recipe.dit.dims: unknown key; did you mean dim?"),
        ("recipe.dit.in_channels=8", "recipe.dit: in_channels follows from the VAE; leave it out"),
        ("recipe.dit.dim=25", "recipe.dit: dim=25 does not divide into num_heads=2"),
        (
            "recipe.objective.kind=fluw",
            "recipe.objective.kind: got 'fluw', expected 'flow', 'ddpm'",
        ),
        ("recipe.objective.shift=-1", "recipe.objective.shift: got -1, expected greater than 0"),
        ("recipe.text.trainable=false", "recipe.text: a frozen text encoder needs a pretrained"),
        ("train.dtype=float64", "train.dtype: got 'float64', expected 'float32' or 'bfloat16'"),
        ("train.grad_accum=3", "train.batch_size=4 does not divide into train.grad_accum=3"),
        ("recipe.latent_cache=x", "set data.random_start=false or leave recipe.latent_cache out"),
        ("train.steps=ten", "train.steps: got 'ten', expected a valid integer"),
        ("data.manifest=null", "data.manifest: got None, expected a path"),
    ],
)
def test_mistakes_are_named(write, override, expected):
    assert expected in problem(write(), override)


def test_muon_is_not_for_the_vae(write):
    expected = "train.optimizer.kind=muon is for the matrices of a DiT"
    assert expected in problem(write("vae"), "train.optimizer.kind=muon")


def test_contexts_are_not_for_the_vae(write):
    expected = "train.parallel.context=2 is for the tokens of a DiT, and the VAE recipe has none"
    assert expected in problem(write("vae"), "train.parallel.context=2")


def test_missing_keys_are_named(write):
    path = write()
    values = yaml.safe_load(path.read_text())
    del values["train"]["steps"]
    path.write_text(yaml.safe_dump(values))
    assert problem(path) == "train.steps: missing; it has no default"
    del values["recipe"]["kind"]
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"recipe\.kind: missing"):
        load_config(path)


def test_every_problem_gets_a_line(write):
    with pytest.raises(ConfigError) as caught:
        load_config(write(), ["train.steps=0", "data.fps=0"])
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("override", ["train.steps", "=3", "out.x=1", "train.steps=[1"])
def test_overrides_that_are_not(write, override):
    with pytest.raises(ConfigError, match="override"):
        load_config(write(), [override])


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "", "\tx: 1"])
def test_files_that_are_no_config(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml does not exist"):
        load_config(tmp_path / "none.yaml")


def test_configs_are_frozen(write):
    config = load_config(write())
    with pytest.raises(ValidationError):
        config.seed = 3


def test_dit_section_resolves_to_the_network_config():
    section = DiTSection(dim=24, num_blocks=1, num_heads=2, mlp_dim=32)
    config = section.resolve(in_channels=5, context_dim=7)
    assert (config.in_channels, config.context_dim, config.dim) == (5, 7, 24)


def test_differing_key(room, tmp_path):
    before = RunConfig.model_validate(room.values(tmp_path, "dit")).model_dump(mode="json")
    assert differing_key(before, before) is None
    for changes, key in (
        ({"logging": {"interval": 1}}, None),
        ({"train": {"keep_checkpoints": 9, "threads": 2}}, None),
        ({"data": {"num_workers": 3}}, None),
        ({"seed": 5}, "seed"),
        ({"train": {"steps": 13}}, "train.steps"),
        ({"recipe": {"objective": {"shift": 1.0}}}, "recipe.objective.shift"),
        ({"data": {"fps": 4.0}}, "data.fps"),
    ):
        values = room.values(tmp_path, "dit", **changes)
        now = RunConfig.model_validate(values).model_dump(mode="json")
        assert differing_key(before, now) == key
        if key is not None:
            assert differing_key(before, now, [key]) is None
            assert differing_key(before, now, [key.split(".")[0]]) is None
            assert differing_key(before, now, [f"{key}s"]) == key
    moved = RunConfig.model_validate(room.values("elsewhere", "dit")).model_dump(mode="json")
    assert differing_key(before, moved) is None
    other = RunConfig.model_validate(room.values(tmp_path, "vae")).model_dump(mode="json")
    assert differing_key(before, other).startswith("recipe")
