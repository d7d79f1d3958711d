from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import sgld.models.embedded.attributes as attr
from sgld.models.embedded.attributes import Scene
from sgld.models.embedded.datasets import CAPTIONS_EACH, Captioned
from sgld.models.embedded.networks import WIDTH, image_text_encoder, video_text_encoder
from sgld.models.embedded.reading import Reader, encode_words, readable, train_reader

pytestmark = pytest.mark.filterwarnings("ignore")
# Building one takes seconds.
TOKENIZER = PreTrainedTokenizerFast.from_pretrained(Path(attr.__file__).parent / "tiny_image" / "tokenizer")
RED, BLUE = attr.COLOURS.index("red"), attr.COLOURS.index("blue")


def one_caption(scenes: list[Scene], captions: list[str]) -> Captioned:
    tokens = TOKENIZER(captions, padding=True, return_tensors="pt")["input_ids"]
    return Captioned(torch.tensor(scenes), tokens[:, None].repeat(1, CAPTIONS_EACH, 1))


def test_a_pair_reads_the_same_whichever_is_named_first() -> None:
    above = Scene(attr.PAIR, colour=RED, shape=1, other_colour=BLUE, other_shape=4, relation=0, background=8)
    below = Scene(attr.PAIR, colour=BLUE, shape=4, other_colour=RED, other_shape=1, relation=1, background=8)
    group = Scene(attr.GROUP, colour=RED, shape=1, number=1, background=8)
    read = readable(torch.tensor([above, below, group]))
    assert torch.equal(read, torch.tensor([above, above, group]))


@torch.no_grad()
def test_reader_looks_at_words_only() -> None:
    words, reader = torch.randn(2, 5, 8), Reader(8)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    torch.testing.assert_close(reader(words, mask)[1:], reader(words[1:, :3], mask[1:, :3]))


@pytest.mark.parametrize("build", [image_text_encoder, video_text_encoder])
def test_what_was_read_depends_on_the_order_of_words(build: type) -> None:
    torch.manual_seed(0)
    scenes = [
        Scene(attr.GROUP, colour=RED, number=1, background=BLUE),
        Scene(attr.GROUP, colour=BLUE, number=1, background=RED),
    ]
    captioned = one_caption(scenes, ["a red circle on a blue background", "a blue circle on a red background"])
    text = build(TOKENIZER)
    reader = train_reader(text, captioned, width=WIDTH, batch_size=4, num_steps=30)
    with torch.no_grad():
        read = reader(*encode_words(text, captioned.tokens[:, 0])).argmax(2)
    assert torch.equal(read, captioned.scenes)
