import random
from collections import Counter

import torch

from sgld.models.embedded import attributes as attr
from sgld.models.embedded import words
from sgld.models.embedded.captions import UNKNOWN, build_tokenizer, caption
from sgld.models.embedded.checker import agreement, agreement_of_clip
from sgld.models.embedded.scenes import draw_dice, draw_scenes, render, render_clips


def test_scenes_and_pictures_are_the_same_for_the_same_seed() -> None:
    def pictures() -> torch.Tensor:
        scenes = torch.tensor(draw_scenes(6, 3))
        return render(scenes, draw_dice(6, torch.Generator().manual_seed(1)), 64, 96)

    assert torch.equal(pictures(), pictures())
    assert pictures().shape == (6, 3, 64, 96)
    assert pictures().min() >= 0
    assert pictures().max() <= 1


def test_training_never_draws_a_held_out_combination() -> None:
    for moving in (False, True):
        trained = set(draw_scenes(5000, 0, moving=moving))
        held_out = set(draw_scenes(500, 1, held_out=True, moving=moving))
        assert not trained & held_out
        assert all(attr.is_held_out(scene) for scene in held_out)


def test_plain_captions_name_the_attributes_of_their_scene() -> None:
    rng = random.Random(0)
    for scene in draw_scenes(300, 2):
        text = caption(scene, rng, plain=True)
        assert UNKNOWN not in text
        if scene.kind == attr.LANDSCAPE:
            assert any(word in text for word in words.TIMES[scene.time])
            assert any(word in text for word in words.PLACES[scene.place])
        else:
            assert any(word in text for word in words.COLOURS[scene.colour])
            assert any(word in text for word in words.COLOURS[scene.background])


def test_tokenizer_ignores_case_and_punctuation_and_maps_other_words_to_unknown() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer("A red Circle!")["input_ids"] == tokenizer("a red circle")["input_ids"]
    assert tokenizer("zeppelin")["input_ids"] == [tokenizer.unk_token_id, tokenizer.eos_token_id]
    assert tokenizer("")["input_ids"] == [tokenizer.eos_token_id]


def test_checker_is_right_on_drawn_pictures() -> None:
    scenes = draw_scenes(80, 4)
    dice = draw_dice(len(scenes), torch.Generator().manual_seed(3))
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for scene, one in zip(scenes, dice, strict=True):
        picture = render(torch.tensor([scene]), one[None], 256, 256)[0]
        for name, is_right in agreement(scene, picture).items():
            asked[name] += 1
            right[name] += is_right
    assert min(right[name] / asked[name] for name in asked) >= 0.97


def test_checker_sees_where_shapes_go() -> None:
    scenes = [scene for scene in draw_scenes(60, 5, moving=True) if scene.kind == attr.GROUP][:6]
    dice = draw_dice(len(scenes), torch.Generator().manual_seed(3))
    clips = render_clips(torch.tensor(scenes), dice, 17, 128, 192).transpose(1, 2)
    assert all(all(agreement_of_clip(*pair).values()) for pair in zip(scenes, clips, strict=True))


def test_checker_tells_a_clip_played_backwards() -> None:
    scene = attr.Scene(attr.GROUP, colour=0, shape=0, position=attr.CENTRE, number=1, background=8, motion=attr.RIGHT)
    clip = render_clips(torch.tensor([scene]), torch.full((1, 192), 0.5), 17, 128, 192)[0].transpose(0, 1)
    assert agreement_of_clip(scene, clip)["direction"]
    assert not agreement_of_clip(scene, clip.flip(0))["direction"]
