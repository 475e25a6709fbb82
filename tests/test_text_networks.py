"""Text encoders that are networks of others: T5, CLIP, causal ones; tiny ones, made on the spot."""

import json

import pytest
import torch
from conftest import read_json, script

import text
from cleaning import clean_caption
from cli import UsageError

TEXTS = ["a seven left of a two", "", "one " * 40]
WORDS = ["<pad>", "</s>", "<unk>", "<s>", "a", "seven", "left", "of", "two", "one", "cat"]


def save_tokenizer(folder, ends: str | None, length: int = 77) -> None:
    """One token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(ends, special_tokens=[("<s>", 3), ("</s>", 1)])
    marks = dict(pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **marks).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """t5 as a pipeline has it, the others flat."""
    import transformers

    home = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(WORDS), bos_token_id=3, eos_token_id=1, pad_token_id=0)
    t5 = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, **sizes)
    transformers.T5EncoderModel(t5).save_pretrained(home / "t5" / "text_encoder")
    save_tokenizer(home / "t5" / "tokenizer", "$A </s>")
    layers = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    clip = transformers.CLIPTextConfig(max_position_embeddings=77, projection_dim=8, **layers, **sizes)
    transformers.CLIPTextModel(clip).save_pretrained(home / "clip")
    save_tokenizer(home / "clip", "<s> $A </s>")
    llama = transformers.LlamaConfig(max_position_embeddings=256, **layers, **sizes)
    transformers.LlamaForCausalLM(llama).save_pretrained(home / "llama")
    save_tokenizer(home / "llama", "<s> $A")
    return home


def by_hand(kind: str, folder, texts):
    """Features of one text after the other, as the library gives them."""
    import transformers

    classes = {"t5": transformers.T5EncoderModel, "clip": transformers.CLIPTextModel, "llama": transformers.AutoModel}
    network = classes[kind].from_pretrained(folder / "text_encoder" if kind == "t5" else folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer" if kind == "t5" else folder)
    found = []
    for each in texts:
        ids = tokenizer(each)["input_ids"]
        if kind == "llama":
            ids = [3, *tokenizer(each, add_special_tokens=False)["input_ids"], 1][:128]
        with torch.no_grad():
            found.append(network(input_ids=torch.tensor([ids]))[0][0])
    return found


@pytest.mark.parametrize("kind", ["t5", "clip", "llama"])
def test_features_are_the_networks_whatever_else_is_in_the_batch(kind, folders):
    encoder = text.open_encoder(str(folders / kind))
    features, mask = encoder(TEXTS)
    assert features.shape == (3, mask.sum(dim=1).max(), encoder.width) and features.dtype == torch.float32
    for row, expected in enumerate(by_hand(kind, folders / kind, TEXTS)):
        assert mask[row].sum() == len(expected) and mask[row, : len(expected)].all()
        torch.testing.assert_close(features[row, : len(expected)], expected, rtol=1e-4, atol=1e-5)
        assert not features[row, len(expected) :].any()
    alone, _ = encoder(TEXTS[:1])
    torch.testing.assert_close(alone[0], features[0, : alone.shape[1]], rtol=1e-4, atol=1e-5)
    few = text.open_encoder(str(folders / kind), length=5)
    mask = few(["one " * 40, "cat"])[1]
    assert few.length == 5 and mask.sum(dim=1).max() == 5


def test_a_network_is_known_again_by_its_weights(folders, tmp_path):
    encoder = text.open_encoder(str(folders / "t5"))
    record = encoder.record()
    assert record["kind"] == "t5" and record["length"] == 120
    moved = tmp_path / "elsewhere"
    moved.symlink_to(folders / "t5")
    assert text.open_encoder(**(record | {"name": str(moved)})).sha256 == encoder.sha256
    with pytest.raises(UsageError, match="has kind clip, that of the training t5"):
        text.open_encoder(**(record | {"name": str(folders / "clip")}))
    with pytest.raises(UsageError, match="has sha256"):
        text.open_encoder(**(record | {"sha256": "0" * 64}))


def test_a_tokenizer_of_sentencepiece(folders, tmp_path):
    """As T5's and LLaMA's own folders have it: spiece.model, and nothing that is faster to read."""
    import sentencepiece

    sentences = iter(["a seven left of a two", "one cat", "two cats left of seven"] * 20)
    with open(tmp_path / "spiece.model", "wb") as file:
        options = dict(vocab_size=40, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=file, minloglevel=2, **options
        )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    (tmp_path / "text_encoder").symlink_to(folders / "t5" / "text_encoder")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    encoder = text.open_encoder(str(tmp_path))
    assert encoder.tokens("one cat") == [*pieces.encode("one cat"), 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/at/all", "text encoder path nowhere/at/all does not exist"),
        ("./nowhere", "text encoder path ./nowhere does not exist"),
        ("t6", "unknown text encoder 't6'; did you mean t5"),
        ("t5", "text encoder DeepFloyd/t5-v1_1-xxl is no folder here and not in the hub's local cache"),
        ("EMPTY", "no config.json in "),
        ("VIT", "a vit encodes no texts here; expected T5, CLIP or a causal language model"),
        ("BARE", "cannot load the text encoder"),
    ],
)
def test_what_is_no_encoder_is_one_line(name, message, tmp_path):
    if name in ("EMPTY", "VIT", "BARE"):
        if name != "EMPTY":
            config = {"model_type": {"VIT": "vit", "BARE": "t5"}[name]}
            (tmp_path / "config.json").write_text(json.dumps(config))
        if name == "BARE":
            save_tokenizer(tmp_path, "$A </s>")
        name = str(tmp_path)
    with pytest.raises(UsageError) as error:
        text.open_encoder(name)
    assert message in str(error.value) and "\n" not in str(error.value)


CLEANED = {
    "A Photo of <person> at https://example.com/a": "a photo of person at",
    "Mona Lisa, by @leonardo #150 — oil&lt;on poplar": "mona lisa, by - oil<on poplar",
    "<b>Red</b> shoes IMG_1234.jpg free shipping": "red shoes",
    "a cat &amp; a dog": "a cat a dog",
    "ab1234 a 3x4 rug, article 1234567": "a rug, article",
    "“quoted”": "quoted",
    "very-long_name-of-a-thing-here": "very long name of a thing here",
    "猫 a cat": "a cat",
    "nothing to do here": "nothing to do here",
}


@pytest.mark.parametrize("caption", CLEANED)
def test_captions_are_cleaned_as_pixart_does(caption):
    assert clean_caption(caption) == CLEANED[caption]


def test_a_run_with_a_network_and_prompts_of_it(folders, tmp_path):
    """PixArt's and Large-DiT's ways to read it; from prompts with and without a negative one."""
    script("scripts/digits.py", "compose", tmp_path / "scenes", "--count", 16, "--prompts", 3)
    common = ["--vae-path", "none", "--image-size", 16, "--patch-size", 4, "--flip", "False", "--device", "cpu"]
    common += ["--num-workers", 0, "--global-batch-size", 8, "--data-path", tmp_path / "scenes", "--log-every", 1]
    runs = {}
    for model, encoder in (("DiT-Nano/2", "t5"), ("DiT_Llama_Nano_patch2", "llama")):
        flags = ["--model", model, "--depth", 1, "--num_experts", 2, "--expert-ratio", 1]
        flags += ["--text-encoder" if encoder == "t5" else "--lm", folders / encoder, "--max-text-tokens", 16]
        if encoder == "llama":
            flags += ["--tokenizer_path", folders / encoder, "--caption_dropout_prob", 0.2, "--rope_scaling_factor", 2]
        script(
            "train.py",
            *common,
            *flags,
            "--results-dir",
            tmp_path / encoder,
            "--max-steps",
            2,
            "--lr",
            0.05,
            "--ema-decay",
            0,
        )
        runs[encoder] = next((tmp_path / encoder).iterdir())
        config = read_json(runs[encoder] / "checkpoints" / "0000002", "config")
        assert config["text"]["name"] == str(folders / encoder) and config["text"]["length"] == 16
        model = config["model"]
        assert (model["caption_width"], model["caption_length"]) == (16, 16)
        llama = encoder == "llama"
        assert (model["reading"], model["row_ends"]) == (("gated", True) if llama else ("cross", False))
        assert (model["class_dropout_prob"], model["position_scaling"]) == ((0.2, 2.0) if llama else (0.1, 1.0))
        draw = ["sample.py", "--ckpt", runs[encoder], "--device", "cpu", "--num-sampling-steps", 2]
        draw += ["--prompt", "a seven", "two one two", "--cfg-scale", 3]
        script(*draw, "--output", tmp_path / encoder / "plain")
        script(*draw, "--negative-prompt", "a cat", "--output", tmp_path / encoder / "negative")
        settings = json.loads((tmp_path / encoder / "negative" / "settings.json").read_text())
        assert settings["negative_prompt"] == "a cat"
        pictures = [(tmp_path / encoder / name / "samples.npz").read_bytes() for name in ("plain", "negative")]
        assert pictures[0] != pictures[1]

    other = ["sample.py", "--ckpt", runs["t5"], "--device", "cpu", "--prompt", "a", "--num-sampling-steps", 2]
    error = script(*other, "--text-encoder", folders / "clip", check=2).stderr
    assert "has kind clip, that of the training t5" in error
    error = script(*other, "--cfg-scale", 1, "--negative-prompt", "a cat", check=2).stderr
    assert "--negative-prompt does nothing without guidance" in error


def test_a_hubs_files_are_fetched_before_they_are_read(folders, monkeypatch):
    """What is asked of the hub, where it would be reached: the configuration first, then all that loading needs."""
    import huggingface_hub

    import hub
    import text_networks

    asked = []
    monkeypatch.setattr(hub, "file_of", lambda place, name, *_, **__: str(folders / "clip" / name))
    monkeypatch.setattr(text_networks, "file_of", hub.file_of)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda place, allow_patterns: asked.append(place))
    features, _ = text.open_encoder("owner/clip")(["a cat"])
    assert asked == ["owner/clip"] and features.shape == (1, 4, 16)
