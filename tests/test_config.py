"""The config: defaults, overrides, and problems, which are all reported at once."""

import importlib.util
from pathlib import Path

import pytest
from conftest import refusal
from ml_collections import ConfigDict

from tav_jax import config
from tav_jax.cli import main, other_names, settings
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
    assert f"tav train --config={file.stem} --workdir=" in module.__doc__
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


def test_help_lists_every_setting_once_with_its_default():
    assert set(settings.MEANINGS) == {name for name, _ in config.leaves(config.get_config())}
    lines = settings.list_settings().splitlines()
    for name, default in config.leaves(config.get_config()):
        [line] = [line for line in lines if line.startswith(f"  {name}=")]
        assert line.startswith(f"  {name}={default!r}  ")
        assert settings.MEANINGS[name] in line
    assert lines[-1] == "Configs that come with the package, as --config=NAME: car_turn, default, man_skiing, sd21"


@pytest.mark.parametrize("command", ["train", "plan"])
def test_help_config_needs_no_other_option(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main.main([command, "--help-config"])
    assert caught.value.code == 0
    assert "train.learning_rate=3e-05  " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["man_skiing", "man-skiing"])
def test_a_named_config_is_found_from_any_directory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings.read_config([f"--config={name}"]).clip.stride == 2
    for wrong, said in (
        ("configs/man_skiing.py", "configs/man_skiing.py does not exist; use --config=man_skiing"),
        ("skiing", "skiing does not exist; give a config file, or one of car_turn, default, man_skiing, sd21"),
    ):
        assert said in refusal(MissingError, settings.read_config, [f"--config={wrong}"])


def test_values_may_follow_a_space():
    options = [
        "--config",
        "man_skiing",
        "--config.train.steps",
        "1e3",
        "--config.mesh.fsdp",
        "--config.log.tensorboard",
    ]
    options += [
        "true",
        "--config.clip.prompt",
        "a man",
        "--config.train.learning_rate",
        "1e-4",
        "--config.mesh.data",
        "-0",
    ]
    c = settings.read_config(options)
    assert (c.train.steps, c.clip.stride, c.clip.prompt) == (1000, 2, "a man")
    assert (c.mesh.fsdp, c.log.tensorboard, c.train.learning_rate) == (True, True, 1e-4)


@pytest.mark.parametrize("value", ["1e3", "1000.0", "1000"])
def test_a_whole_number_may_be_written_with_an_exponent(value, tmp_path):
    assert settings.read_config([f"--config.train.steps={value}"]).train.steps == 1000
    (tmp_path / "config.json").write_text(f'{{"train": {{"steps": {value}}}}}')
    assert settings.read_config([f"--config={tmp_path}/config.json"]).train.steps == 1000


@pytest.mark.parametrize(
    ("name", "meant"),
    {
        "train.lr": "train.learning_rate",
        "train.max_steps": "train.steps",
        "edit.prompt": "edit.prompts",
        "model.name": "model.path",
        "pretrained_model_path": "model.path",
        "train_data.video_path": "clip.path",
        "n_sample_frames": "clip.frames",
        "max_train_steps": "train.steps",
        "guidance_scale": "edit.guidance",
        "num_inference_steps": "edit.steps",
        "num_inv_steps": "edit.inversion_steps",
        "trainable_modules": "train.trainable",
        "steps": "edit.steps or train.steps",
        "prompt": "clip.prompt",
        "train.stepz": "train.steps",
    }.items(),
)
def test_an_unknown_setting_is_answered_by_meaning(name, meant):
    message = refusal(InputError, settings.read_config, [f"--config.{name}=3"])
    assert message == f"{name} is not a setting, did you mean {meant}"


def test_the_other_names_are_of_settings():
    known = {name for name, _ in config.leaves(config.get_config())}
    assert {*other_names.OFFICIAL_NAMES.values(), *other_names.OTHER_WORDS} <= known


OFFICIAL = """
pretrained_model_path: "./checkpoints/sd14"
output_dir: "./outputs/man-skiing"
train_data: {video_path: data/man-skiing.mp4, prompt: a man is skiing, n_sample_frames: 16, width: 384, height: 512,
  sample_start_idx: 1, sample_frame_rate: 2}
validation_data: {prompts: [a panda is skiing], video_length: 16, width: 384, height: 512, num_inference_steps: 40,
  guidance_scale: 7, use_inv_latent: True, num_inv_steps: 45}
learning_rate: 3e-5
train_batch_size: 1
max_train_steps: 300
checkpointing_steps: 1000
validation_steps: 50
trainable_modules: [attn1.to_q, attn_temp]
seed: 34
mixed_precision: no
use_8bit_adam: False
gradient_checkpointing: False
enable_xformers_memory_efficient_attention: True
"""


def test_a_yaml_config_of_the_official_code_is_converted(tmp_path, capsys):
    (tmp_path / "man-skiing.yaml").write_text(OFFICIAL)
    c = settings.read_config([f"--config={tmp_path}/man-skiing.yaml", "--config.clip.start=2"])
    assert dict(c.clip) == {
        "path": "data/man-skiing.mp4", "prompt": "a man is skiing", "frames": 16, "height": 512, "width": 384,
        "start": 2, "stride": 2, "fit": "stretch",
    }  # fmt: skip
    assert (c.model.path, c.model.dtype, c.seed) == ("./checkpoints/sd14", "float32", 34)
    assert (c.edit.prompts, c.edit.steps, c.edit.inversion_steps, c.edit.guidance) == (
        ("a panda is skiing",),
        40,
        45,
        7,
    )
    t = c.train
    assert (t.steps, t.learning_rate, t.trainable, t.remat) == (300, 3e-5, ("attn1.to_q", "attn_temp"), "none")
    assert (t.checkpoint_every, t.preview_every) == (1000, 50)
    [note] = capsys.readouterr().err.splitlines()
    ignored = (
        "enable_xformers_memory_efficient_attention=True",
        "output_dir=",
        "train_batch_size=1",
        "use_8bit_adam=F",
    )
    for part in ("without a counterpart: ", *ignored):
        assert part in note


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr_scheduler: cosine", "lr_scheduler is 'cosine'; only 'constant' is supported"),
        ("gradient_accumulation_steps: 4", "gradient_accumulation_steps is 4; only 1 is supported"),
        ("validation_data: {video_length: 24}", "validation_data.video_length is 24; only 8 is supported"),
        (
            "max_train_step: 3\nlearning_rate: 1",
            "has max_train_step, which is neither a setting of the official code nor",
        ),
        ("learning_rate: fast", "train.learning_rate is 'fast', expected a number"),
        ("train: {stepz: 3}", "train.stepz is not a setting"),
        ("- 1", "is [1], expected a table of settings"),
        ("{", "is not readable YAML"),
    ],
)
def test_yaml_configs_that_are_refused(text, said, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    assert said in refusal(InputError, settings.read_config, [f"--config={tmp_path}/config.yaml"])


def test_a_yaml_config_with_our_settings(tmp_path):
    (tmp_path / "config.yml").write_text("train: {steps: 7, learning_rate: 3e-4}\nseed: 1")
    c = settings.read_config([f"--config={tmp_path}/config.yml"])
    assert (c.train.steps, c.train.learning_rate, c.seed, c.clip.fit) == (7, 3e-4, 1, "crop")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config.train.stepz=3"], "train.stepz is not a setting, did you mean train.steps"),
        (["--config.guidance=3"], "guidance is not a setting, did you mean edit.guidance"),
        (["--config.train.steps=many"], "--config.train.steps=many is not a whole number"),
        (["--config.train.steps=1.5"], "--config.train.steps=1.5 is not a whole number"),
        (["--config.seed=1e999"], "--config.seed=1e999 is not a whole number"),
        (["--config.train.steps"], "--config.train.steps has no value; use --config.train.steps=VALUE"),
        (["--config.clip.prompt=a", "man"], "'man' is not an option"),
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


def test_prompt_that_is_not_given_differs_from_the_empty_prompt(tmp_path):
    assert settings.read_config([]).clip.prompt is None
    assert settings.read_config(["--config.clip.prompt="]).clip.prompt == ""
    stored = tmp_path / "config.json"
    for prompt in (None, "", "a man"):
        stored.write_text(config.to_json(config.validate(changed(clip__prompt=prompt))))
        assert settings.read_config([f"--config={stored}"]).clip.prompt == prompt


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
    with pytest.raises(InputError, match=r"train\.remat is 'blocks'; it must be one of auto, none, products, att"):
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
