"""Says in words what a scene shows, in many ways, and turns words into the tokens of the embedded models."""

import random
import re

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from sgld.models.embedded import attributes as attr
from sgld.models.embedded import words
from sgld.models.embedded.attributes import Scene
from sgld.models.embedded.scenes import draw_scenes

PAD, END, UNKNOWN = "[PAD]", "[EOS]", "[UNK]"
# The longest prompt in training, in tokens with the end token; longer prompts are cut by no one, only unfamiliar.
MAX_TOKENS = 32


def caption(scene: Scene, rng: random.Random, *, plain: bool = False) -> str:
    """One caption of a scene; details are left out now and then, and words that mean nothing may be added.

    :param plain: name every attribute that evaluation checks, and add nothing.
    """
    text = (_landscape, _group, _pair)[scene.kind](scene, rng, plain)
    # "A orange" and the like; people rarely write it.
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    if plain:
        return text
    if rng.random() < 0.35:
        text = f"{rng.choice(words.OPENINGS)} {text}"
    if rng.random() < 0.25:
        text = f"{text}, {', '.join(rng.sample(words.ENDINGS, rng.randint(1, 2)))}"
    return _sprinkle_unknown(text, rng)


def _sprinkle_unknown(text: str, rng: random.Random) -> str:
    """Puts unknown words into one caption in seven, so that free prompts still work; one in forty is nothing else."""
    chance = rng.random()
    if chance < 0.025:
        return " ".join(
            rng.choice((UNKNOWN, UNKNOWN, "a", "the", "in", "on", "with")) for _ in range(rng.randint(1, 9))
        )
    parts = text.split(" ")
    for _ in range(rng.randint(1, 3) if chance < 0.15 else 0):
        parts.insert(rng.randint(0, len(parts)), UNKNOWN)
    return " ".join(parts)


def _landscape(scene: Scene, rng: random.Random, plain: bool) -> str:
    time, place = rng.choice(words.TIMES[scene.time]), rng.choice(words.PLACES[scene.place])
    adjective = rng.choice(words.ADJECTIVES) if rng.random() < 0.4 else ""
    kept = 1.0 if plain else rng.random()
    if kept < 0.07:
        base = f"{adjective} {place}"
    elif kept < 0.14:
        base = f"{adjective} {time}"
    else:
        base = rng.choice(words.LANDSCAPES).format(time=time, place=place, adj=adjective)
    details = _landscape_details(scene, rng)
    rng.shuffle(details)
    keep = 0.8 if not plain else 1.0
    text = " ".join([base, *(detail for detail in details if rng.random() < keep)])
    if scene.motion:
        text = _with_motion(text, _disc_motion(scene, rng), rng, plain)
    return re.sub(r" +", " ", text).strip().format(disc="moon" if scene.time == 1 else "sun")


def _landscape_details(scene: Scene, rng: random.Random) -> list[str]:
    details = []
    if scene.extra:
        details.append(rng.choice(words.EXTRAS[scene.extra]))
    if scene.has_clouds and scene.motion not in (attr.CLOUDS_LEFT, attr.CLOUDS_RIGHT):
        details.append(rng.choice(words.CLOUDS))
    if not scene.has_clouds and rng.random() < 0.3:
        details.append(rng.choice(words.NO_CLOUDS))
    if scene.has_disc and scene.motion in (attr.STILL, attr.CLOUDS_LEFT, attr.CLOUDS_RIGHT):
        place = rng.choice(words.SIDES[scene.side]) if rng.random() < 0.6 else ""
        details.append(f"{rng.choice(words.DISCS)} {place}")
    return details


def _disc_motion(scene: Scene, rng: random.Random) -> str:
    """How the sun, the moon or the clouds move."""
    ways = words.MOTIONS[scene.motion]
    named = [way for way in ways if "{disc}" in way]
    return rng.choice(named or ways)


def _with_motion(text: str, motion: str, rng: random.Random, plain: bool) -> str:
    chance = 0.0 if plain else rng.random()
    if chance < 0.7:
        return f"{text}, {motion}"
    return f"{motion}, {text}" if chance < 0.95 else text


def _noun(shape: int, number: int, rng: random.Random) -> str:
    singular, plural = rng.choice(words.SHAPES[shape])
    return singular if number == 1 else plural


def _group(scene: Scene, rng: random.Random, plain: bool) -> str:
    colour = rng.choice(words.COLOURS[scene.colour])
    size = rng.choice(words.SIZES[scene.size]) if plain or rng.random() < 0.75 else ""
    article = "a" if rng.random() < 0.9 else "one"
    count = article if scene.number == 1 else rng.choice(words.NUMBERS[scene.number])
    noun = "ball" if scene.motion == attr.BOUNCE and scene.shape == 0 else _noun(scene.shape, scene.number, rng)
    text = f"{count} {size} {colour} {noun}"
    if scene.motion:
        text = f"{text} {rng.choice([way for way in words.MOTIONS[scene.motion] if '{disc}' not in way])}"
    elif scene.number > 1:
        text += f" {rng.choice(words.IN_A_ROW)}" if scene.position == 1 else ""
    elif scene.position != attr.CENTRE or rng.random() < 0.6:
        text += f" {rng.choice(words.POSITIONS[scene.position])}"
    return _on_background(text, scene, rng, plain)


def _pair(scene: Scene, rng: random.Random, plain: bool) -> str:
    first = f"a {rng.choice(words.COLOURS[scene.colour])} {_noun(scene.shape, 1, rng)}"
    second = f"a {rng.choice(words.COLOURS[scene.other_colour])} {_noun(scene.other_shape, 1, rng)}"
    relation = scene.relation
    if rng.random() < 0.3:
        first, second, relation = second, first, relation ^ 1
    # Side by side leaves open which is where.
    vague = not plain and rng.random() < 0.2
    between = rng.choice(words.BESIDE if vague else words.RELATIONS[relation])
    return _on_background(f"{first} {between} {second}", scene, rng, plain)


def _on_background(text: str, scene: Scene, rng: random.Random, plain: bool) -> str:
    colour = rng.choice(words.COLOURS[scene.background])
    if plain or rng.random() < (0.75 if scene.background >= 8 else 0.95):
        text = f"{text} {rng.choice(words.BACKGROUNDS).format(colour=colour)}"
    return re.sub(r" +", " ", text)


def vocabulary() -> list[str]:
    """Every word that captions use, in alphabetical order: the same list each time."""
    rng, found = random.Random(0), set()
    for moving in (False, True):
        for scene in draw_scenes(20_000, 1, moving=moving):
            found.update(re.findall(r"[a-z0-9]+", caption(scene, rng).replace(UNKNOWN, " ").lower()))
    return sorted(found)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; case and punctuation mean nothing, and an end token closes each prompt."""
    table = {word: index for index, word in enumerate([PAD, END, UNKNOWN, *vocabulary()])}
    core = Tokenizer(WordLevel(table, unk_token=UNKNOWN))
    # Hyphens and apostrophes part words.
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^a-z0-9]+"), " ")])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, table[END])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=512
    )
