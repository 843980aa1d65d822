"""Captioners: tiny models with random weights, made here, through the whole of what real ones do."""

import json

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from data import captioner
from data.captioner import caption_clips, check_captioner
from data.ingest import ingest
from data.ingest_config import Captioner, Prompt, load_ingest_config
from data.video_write import write_video

WORDS = "a clip of red blue green things that move left right up down Describe this video"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
SPECIAL += [f"<|{name}|>" for name in ("image_pad", "video_pad", "vision_start", "vision_end")]
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% elif part['type'] == 'video' %}VIDEO "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def make_tokenizer():
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:],
    )


def save(folder, network, processor):
    network.generation_config.eos_token_id = None
    network.generation_config.suppress_tokens = list(range(len(SPECIAL)))
    network.generation_config.pad_token_id = 0
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """Takes images, and has a chat template."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=4, vision_feature_layer=-1
    )
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        chat_template=CHAT,
        num_additional_image_tokens=1,
    )
    network = transformers.LlavaForConditionalGeneration(config)
    return save(tmp_path_factory.mktemp("llava"), network, processor)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Takes images and videos, and has a chat template."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = transformers.Qwen2VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        ),
        vision_config=dict(
            depth=2, embed_dim=16, num_heads=2, hidden_size=16, patch_size=14, mlp_ratio=1
        ),
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
    template = CHAT.replace("VIDEO", "<|vision_start|> <|video_pad|> <|vision_end|>")
    template = template.replace("<image>", "<|vision_start|> <|image_pad|> <|vision_end|>")
    sizes = dict(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    processor = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(**sizes),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**sizes),
        chat_template=template,
    )
    network = transformers.Qwen2VLForConditionalGeneration(config)
    return save(tmp_path_factory.mktemp("qwen"), network, processor)


@pytest.fixture(scope="module")
def git(tmp_path_factory):
    """Takes one image, and has no chat template: the caption goes on from the prompt."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    vision = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = transformers.GitConfig(
        vision_config=vision,
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    processor = transformers.GitProcessor(
        transformers.CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
        tokenizer,
    )
    return save(tmp_path_factory.mktemp("git"), transformers.GitForCausalLM(config), processor)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, pan):
    folder = tmp_path_factory.mktemp("clips")
    found = []
    for k in range(3):
        path = folder / f"{k}.mp4"
        write_video(path, pan(k, 20), fps=10)
        task = {"path": str(path), "start": 0.0, "end": 2.0, "is_image": False}
        found.append(task | {"width": 160, "height": 96})
    found[1]["crop"] = [0, 0, 30, 30]  # of fewer tokens than the others, where sizes differ
    return found


PROMPTS = [Prompt(prompt="Describe this video", max_new_tokens=n) for n in (3, 7)]


def lengths(results):
    return [[len(text.split()) for text in result[0]["generated"]] for result in results]


@pytest.mark.parametrize(
    ("model", "frames_as"),
    [("llava", "auto"), ("qwen", "video"), ("qwen", "images"), ("git", "auto")],
)
def test_several_captions_of_different_length(request, tasks, model, frames_as):
    folder = request.getfixturevalue(model)
    settings = Captioner(
        model=folder, prompts=PROMPTS, num_frames=4, frames_as=frames_as, device="cpu"
    )
    results = caption_clips(tasks, settings)
    assert len(results) == 3
    for short, long in lengths(results):
        assert short <= 3 < long <= 7
    for result in results:
        for text in result[0]["generated"]:
            assert not text.startswith("Describe this video")
            assert not any(special in text for special in SPECIAL)
    # A batch gives what its clips give alone.
    alone = [caption_clips([task], settings)[0] for task in tasks]
    assert alone == results


def test_the_model_sees_the_clip_and_is_asked_the_prompt(qwen, tasks, monkeypatch):
    seen = []
    model = captioner._load(str(qwen), "cpu")
    original = type(model.processor).__call__

    def spy(self, *args, **kwargs):
        seen.append(kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model.processor), "__call__", spy)
    settings = Captioner(model=qwen, prompts=PROMPTS[:1], num_frames=4, height=48, device="cpu")
    task = tasks[0] | {"start": 0.5, "end": 1.5, "crop": [20, 10, 100, 80]}
    caption_clips([task], settings)
    (call,) = seen
    assert "Describe this video" in call["text"][0]
    assert call["videos"][0].shape == (4, 48, 60, 3)
    assert call["video_metadata"][0]["fps"] == 4
    picture = task | {"is_image": True}
    del picture["start"], picture["end"]
    caption_clips([picture], settings)
    assert "videos" not in seen[1]
    assert len(seen[1]["images"][0]) == 1


def test_one_bad_clip_spoils_no_batch(llava, tasks):
    settings = Captioner(model=llava, prompts=PROMPTS, num_frames=2, device="cpu")
    results = caption_clips([tasks[0], tasks[1] | {"path": "gone.mp4"}, tasks[2]], settings)
    assert results[1] == [{"error": "no such file"}]
    assert all("generated" in results[index][0] for index in (0, 2))


def test_ingest_captions_what_has_none(tmp_path, llava, pan):
    src = tmp_path / "src"
    src.mkdir()
    for k in range(3):
        write_video(src / f"{k}.mp4", pan(30 + k, 20), fps=10)
    (src / "0.txt").write_text("by hand")
    write_video(src / "short.mp4", pan(40, 5), fps=10)
    how = f"{{model: {llava}, num_frames: 2, device: cpu, prompts: [{{max_new_tokens: 4}}]}}"
    overrides = ["filters.min_sharpness=null", "filters.min_height=64"]
    overrides.append(f"captions.captioner={how}")

    def rows(*more):
        config = load_ingest_config(None, [*overrides, *more])
        result = ingest(str(src), tmp_path / "out", config, workers=0)
        return [json.loads(line) for line in result.manifest.read_text().splitlines()]

    found = rows()
    assert [row["keep"] for row in found] == [True, True, True, False]
    assert found[0]["caption"] == "by hand"
    assert [row.get("caption_from") for row in found] == ["files", "captioner", "captioner", None]
    store = tmp_path / "out" / "steps" / "captioner.jsonl"
    assert len(store.read_text().splitlines()) == 2
    assert rows() == found
    assert len(store.read_text().splitlines()) == 2  # nothing was written anew
    both = rows("captions.recaption=true")
    assert both[0]["caption"][0] == "by hand"
    assert len(both[0]["caption"]) == 2
    assert both[0]["caption_from"] == "files and captioner"
    assert len(store.read_text().splitlines()) == 3
    # Other clips that pass now are captioned, and only they.
    assert rows("filters.min_seconds=0.3")[3]["caption_from"] == "captioner"
    assert len(store.read_text().splitlines()) == 4


def test_mistakes_are_one_line(tmp_path, llava, tasks):
    with pytest.raises(FileNotFoundError, match=r"no config\.json; expected the folder"):
        check_captioner(Captioner(model=tmp_path / "gone"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="not a model that transformers loads") as error:
        caption_clips(tasks, Captioner(model=tmp_path, device="cpu"))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="takes no videos"):
        caption_clips(tasks, Captioner(model=llava, frames_as="video", device="cpu"))
    config = load_ingest_config(None, [f"captions.captioner={{model: {tmp_path / 'gone'}}}"])
    with pytest.raises(FileNotFoundError, match="gone"):
        ingest(tasks[0]["path"], tmp_path / "out", config, workers=0)
    assert not (tmp_path / "out").exists()


def test_embeddings_find_what_hashes_do_not(tmp_path, pan):
    """An open_clip tower of random weights sees a mirrored copy as the same; hashes do not."""
    import open_clip

    torch.manual_seed(0)
    weights = tmp_path / "weights.pt"
    torch.save(open_clip.create_model("ViT-S-32", pretrained=None).state_dict(), weights)
    src = tmp_path / "src"
    src.mkdir()
    video = pan(50, 20)
    write_video(src / "a.mp4", video, fps=10)
    write_video(src / "b.mp4", np.ascontiguousarray(video[:, :, ::-1]), fps=10)
    common = ["filters.min_sharpness=null", "filters.min_height=64", "captions.default=x"]
    clip = f"duplicates.clip={{model: ViT-S-32, weights: {weights}, min_cosine: 0.9}}"

    def reasons(*more):
        config = load_ingest_config(None, [*common, *more])
        result = ingest(str(src), tmp_path / "out", config, workers=0)
        return [record["drop_reasons"] for record in result.records]

    assert reasons() == [[], []]
    first, second = reasons(clip)
    assert first == []
    assert "embeddings have a cosine of" in second[0]
    store = tmp_path / "out" / "steps" / "embeddings.jsonl"
    before = store.read_bytes()
    assert reasons(clip.replace("0.9", "1.0")) == [[], []]
    assert store.read_bytes() == before
    with pytest.raises(FileNotFoundError, match=r"duplicates\.clip\.weights="):
        reasons("duplicates.clip={model: ViT-S-32, weights: gone.pt}")
    with pytest.raises(ValueError, match="not an open_clip model"):
        reasons(clip.replace("ViT-S-32", "ViT-Q"))
