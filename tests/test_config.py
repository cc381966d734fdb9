"""The config: defaults, overrides, and problems, which are all reported at once."""

import importlib.util
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from tav_jax import config
from tav_jax.cli import settings
from tav_jax.errors import InputError, MissingError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def changed(**changes) -> ConfigDict:
    """The default config with changes of any type."""
    table = config.get_config().to_dict()
    for name, value in changes.items():
        *groups, last = name.split("__")
        (table[groups[0]] if groups else table)[last] = value
    return ConfigDict(table)


def test_the_defaults_are_the_papers():
    c = config.validate(config.get_config())
    assert (c.clip.frames, c.clip.height, c.clip.width) == (24, 512, 512)
    assert (c.train.steps, c.train.learning_rate, c.train.max_grad_norm, c.train.weight_decay) == (500, 3e-5, 1.0, 1e-2)
    assert (c.edit.steps, c.edit.inversion_steps, c.edit.guidance) == (50, 50, 12.5)
    assert c.train.trainable == ("attn1.to_q", "attn2.to_q", "attn_temp")
    assert (c.mesh.data, c.mesh.frames) == (0, 0)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_config_files_are_valid_and_document_their_launch_line(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = config.validate(module.get_config())
    assert f"tav train --config=configs/{file.name} --workdir=" in module.__doc__
    assert settings.read_config([f"--config={file}"]) == expected
    assert config.from_json(config.to_json(expected)) == expected


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("a man, skiing", ("a man, skiing",)),
        ("('a', 'b')", ("a", "b")),
        ("['a', 'b']", ("a", "b")),
        ("it's one", ("it's one",)),
        ("", ("",)),
        ("()", ()),
    ],
)
def test_lists_of_texts_from_the_command_line(given, prompts):
    assert settings.read_config([f"--config.edit.prompts={given}"]).edit.prompts == prompts


def test_overrides_reach_the_config_in_its_types():
    c = settings.read_config(
        [
            "--config.train.steps=300",
            "--config.train.learning_rate=1",
            "--config.clip.prompt=a man, skiing = fun",
            "--config.edit.prompts=('a', 'b c')",
            "--config.model.temporal_attention=False",
        ]
    )
    assert c.train.steps == 300
    assert c.train.learning_rate == 1.0
    assert c.clip.prompt == "a man, skiing = fun"
    assert c.edit.prompts == ("a", "b c")
    assert c.model.temporal_attention is False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config.train.stepz=3"], "train.stepz is not a setting, did you mean train.steps"),
        (["--config.guidance=3"], "guidance is not a setting, did you mean edit.guidance"),
        (["--config.train.steps=many"], "train.steps=many"),
        (["--config.edit.steps=1000"], "edit.steps is 1000; it must be 1 to 999"),
        (["--config.clip.height=502"], "clip.height 502 is not a multiple of 8 (of 4 for a VAE with fewer levels"),
        (["--config.clip.width=9000"], "clip.width is 9000; it must be a multiple of 8, at most 8192"),
        (["--config.edit.sampler=euler"], "edit.sampler is 'euler'; it must be one of ddim"),
        (["--config.mesh.frames=-1"], "mesh.frames is -1; it must be 0 to 65536"),
        (["--config.model.dtype=int4"], "model.dtype is 'int4'; it must be one of bfloat16, float16, float32"),
        (["--verbose"], "'--verbose' is not an option; settings are --config.NAME=VALUE"),
        (["--config.train.trainable=('down',)"], "must name at least one kind of layer"),
    ],
)
def test_command_lines_that_are_refused(arguments, said):
    with pytest.raises(InputError) as caught:
        settings.read_config(arguments)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_problems_are_reported_together():
    with pytest.raises(InputError) as caught:
        config.validate(changed(train__steps=0, clip__width=7, train__stepz=1, clip__prompt=5))
    for part in (
        "train.steps is 0",
        "clip.width 7",
        "train.stepz is not a setting",
        "clip.prompt is 5, expected a string",
    ):
        assert part in str(caught.value)


def test_a_config_file_that_is_missing_or_broken(tmp_path):
    with pytest.raises(MissingError, match=r"nowhere\.py does not exist"):
        settings.read_config([f"--config={tmp_path}/nowhere.py"])
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    with pytest.raises(InputError, match="the config cannot be read"):
        settings.read_config([f"--config={tmp_path}/broken.py"])


@pytest.mark.parametrize(
    ("given", "meant"), [(True, "block"), (False, "none"), ("True", "block"), ("false", "none"), ("level", "level")]
)
def test_remat_is_a_name_or_a_bool(given, meant):
    assert config.validate(changed(train__remat=given)).train.remat == meant


def test_an_unknown_remat_is_refused():
    with pytest.raises(InputError, match=r"train\.remat is 'blocks'; it must be one of none, products, attention"):
        config.validate(changed(train__remat="blocks"))


def test_settings_that_may_change_when_a_run_continues():
    before = config.get_config()
    now = config.validate(
        changed(
            train__steps=900,
            train__remat=False,
            edit__guidance=7.0,
            edit__prompts=("a",),
            train__preview_every=0,
            log__tensorboard=True,
        )
    )
    assert config.differences(before, now) == []
    now = config.validate(changed(train__learning_rate=1e-4, clip__stride=2, seed=1))
    assert set(config.differences(before, now)) == {
        "clip.stride was 1 and is 2",
        "seed was 33 and is 1",
        "train.learning_rate was 3e-05 and is 0.0001",
    }


@pytest.mark.parametrize(
    ("side", "factor", "message"),
    [
        (512, 8, None),
        (500, 4, None),
        (500, 8, "height 500 is not a multiple of 8; use 496 or 504"),
        (6, 8, "height 6 is not a multiple of 8; use 8"),
        (30, 4, "height 30 is not a multiple of 4; use 28 or 32"),
        (500, None, None),  # a small VAE may take it: checked again with its factor
        (502, None, "height 502 is not a multiple of 8 (of 4 for a VAE with fewer levels than Stable Diffusion's)"),
        (9000, None, "height is 9000; it must be a multiple of 8, at most 8192"),
        (True, 8, "height is True; it must be a whole number"),
        (64.0, 8, "height is 64.0; it must be a whole number"),
    ],
)
def test_sizes_are_multiples_of_the_vaes_factor(side, factor, message):
    if message is None:
        config.check_size(side, 64, factor)
        return
    with pytest.raises(InputError) as caught:
        config.check_size(side, 64, factor)
    assert message in str(caught.value)


def test_sampling_steps_above_the_inversions_are_refused():
    edit = config.validate(changed(edit__steps=60)).edit
    with pytest.raises(InputError, match=r"edit\.steps is 60 and edit\.inversion_steps is 50; sample with at most 50"):
        config.check_edit_steps(edit)
    config.check_edit_steps(config.get_config().edit)
