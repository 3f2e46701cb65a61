"""Exact checks against the ground truth: captions and images of scenes are turned back into facts.

Captions are parsed with the grammar of `scene_captions`. Images are read by analysis by synthesis: every cell is
compared with all possible contents on each background.
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from uae_jax.data.scene_captions import NUMBERS, holds
from uae_jax.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    ROWS,
    SHAPES,
    SIZES,
    PlacedObject,
    Scene,
    SceneObject,
    coverage,
    fact_kinds,
    facts,
    object_facts,
)

_PALETTE = np.array(list(COLOURS.values()), np.float32)
_GROUNDS = np.array(list(BACKGROUNDS.values()), np.float32)


class Grammar:
    """The words of captions of one kind of scene.

    Args:
      backgrounds: names allowed before "background".
      noun_name: the fact that a noun states.
      nouns: last words of a phrase; a noun may have several words.
      values: other facts, {value: name}; sizes and positions are always known.
    """

    def __init__(self, backgrounds: tuple[str, ...], noun_name: str, nouns: tuple[str, ...], values: Mapping[str, str]):
        self.backgrounds = frozenset(backgrounds)
        self.noun_name = noun_name
        self.names = (
            {f"{row} {column}": "position" for row in ROWS for column in COLUMNS}
            | dict.fromkeys(SIZES, "size")
            | dict(values)
            | dict.fromkeys(nouns, noun_name)
            | {"object": "noun"}
        )
        self.longest = max(value.count(" ") + 1 for value in self.names)

    def value_at(self, words: list[str], at: int) -> str:
        """The longest value that begins at a word, or the word itself."""
        for length in range(min(self.longest, len(words) - at), 0, -1):
            value = " ".join(words[at : at + length])
            if value in self.names:
                return value
        return words[at]


SCENES = Grammar(tuple(BACKGROUNDS), "shape", SHAPES, dict.fromkeys(COLOURS, "colour"))


@functools.singledispatch
def grammar_of(scene: Scene) -> Grammar:
    """The grammar of captions of such a scene; other kinds of scenes register their grammar."""
    del scene
    return SCENES


@dataclasses.dataclass(frozen=True)
class Mention:
    """One mentioned object: its claimed facts as ((name, value), ...), repeated `count` times."""

    claims: tuple[tuple[str, str], ...]
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Parsed:
    """The claims of a caption: backgrounds, objects, relations (first mention, words, second), unparsed words."""

    backgrounds: tuple[str, ...]
    mentions: tuple[Mention, ...]
    relations: tuple[tuple[int, str, int], ...]
    unparsed: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class CaptionScore:
    """Counts of one caption against one scene.

    Attributes:
      recalled: facts of the scene that the caption states.
      correct: true claims (recalled facts and true relations).
      claimed: all claims, with unparsed words.
      total: facts of the scene.
      unparsed: words outside the grammar.
      kinds: by `scenes.fact_kinds`, the recalled facts and the facts of the scene.
    """

    recalled: int
    correct: int
    claimed: int
    total: int
    unparsed: tuple[str, ...] = ()
    kinds: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def recall_by_kind(self) -> dict[str, float]:
        """`fact_recall` by kind of fact, without kinds that the scene lacks."""
        return {kind: said / there for kind, (said, there) in self.kinds.items() if there}

    @property
    def fact_recall(self) -> float:
        """Share of the scene's facts that the caption states, in [0, 1]."""
        return self.recalled / self.total

    @property
    def fact_precision(self) -> float:
        """Share of true claims, in [0, 1]; 0 for a caption without claims."""
        return self.correct / self.claimed if self.claimed else 0.0


class _Reader:
    """One pass over the words of a clause; `unparsed` collects words that do not fit."""

    def __init__(self, words: list[str], grammar: Grammar):
        self.words, self.grammar, self.at = words, grammar, 0
        self.unparsed: list[str] = []

    def peek(self, offset: int = 0) -> str:
        index = self.at + offset
        return self.words[index] if index < len(self.words) else ""

    def relation(self) -> str | None:
        """Takes a relation if the next words are one."""
        if self.peek() in ("above", "below"):
            self.at += 1
            return self.words[self.at - 1]
        if self.peek() in COLUMNS and self.peek(1) == "of":
            self.at += 2
            return f"{self.words[self.at - 2]} of"
        return None

    def phrase(self) -> Mention | None:
        """Takes words up to and including a noun, or up to a link. A repeated fact in a phrase is unparsed."""
        claims: dict[str, str] = {}
        count, noun = 1, ""
        numbered = False
        while self.at < len(self.words) and not noun:
            word = self.peek()
            if word == "and" or word in ("above", "below") or (word in COLUMNS and self.peek(1) == "of"):
                break
            value = self.grammar.value_at(self.words, self.at)
            name = self.grammar.names.get(value, "")
            self.at += value.count(" ") + 1
            if name in (self.grammar.noun_name, "noun"):
                noun = value
            if word in NUMBERS and not numbered and not claims and not noun:
                count, numbered = NUMBERS[word], True
            elif not name or name in claims:
                self.unparsed += value.split()
            elif name != "noun":
                claims[name] = value
        if not claims:
            self.unparsed += [noun] if noun else []
            return None
        return Mention(tuple(claims.items()), count)


def parse_caption(text: str, grammar: Grammar = SCENES) -> Parsed:
    """The claims of a caption; words outside the grammar are returned as unparsed, never an error."""
    backgrounds: list[str] = []
    mentions: list[Mention] = []
    relations: list[tuple[int, str, int]] = []
    unparsed: list[str] = []
    for clause in text.replace(",", " , ").split(" , "):
        words = clause.replace(",", " ").split()
        if words[-1:] == ["background"] and " ".join(words[:-1]) in grammar.backgrounds:
            backgrounds.append(" ".join(words[:-1]))
            continue
        reader = _Reader(words, grammar)
        previous, link = None, None
        while reader.at < len(words):
            mention = reader.phrase()
            index = None
            if mention is not None:
                index = len(mentions)
                mentions.append(mention)
            if link is not None:
                if previous is None or index is None:
                    unparsed += link.split()
                elif link != "and":
                    relations.append((previous, link, index))
            previous, link = index, None
            if reader.at < len(words):
                link = reader.relation()
                if link is None and reader.peek() == "and":
                    link = "and"
                    reader.at += 1
        unparsed += link.split() if link is not None else []
        unparsed += reader.unparsed
    return Parsed(tuple(backgrounds), tuple(mentions), tuple(relations), tuple(unparsed))


def match_mentions(claims: Sequence[Mapping[str, str]], objects: Sequence[Mapping[str, str]]) -> dict[int, int]:
    """The one-to-one assignment of mentions to objects with the most true claims; ties go to the first mention.

    A dynamic programme over subsets of the objects.

    Args:
      claims: the claimed facts of each mention.
      objects: the facts of each object.

    Returns:
      Index of mention to index of object, without unassigned mentions.
    """
    best: dict[int, tuple[int, dict[int, int]]] = {0: (0, {})}
    for number, claim in enumerate(claims):
        after = dict(best)
        for used, (value, pairs) in best.items():
            for index, truth in enumerate(objects):
                gained = value + len(claim.items() & truth.items())
                key = used | 1 << index
                if not used >> index & 1 and gained > after.get(key, (-1, {}))[0]:
                    after[key] = (gained, {**pairs, number: index})
        best = after
    return max(best.values(), key=lambda item: item[0])[1]


def _matching(claims: Sequence[Mapping[str, str]], scene: Scene) -> collections.Counter[str]:
    """Counts of true claims by kind of fact, under the assignment of `match_mentions`."""
    known = [object_facts(item) for item in scene.objects]
    pairs = match_mentions(claims, known).items()
    return collections.Counter(
        kind for number, index in pairs for kind, value in known[index].items() if claims[number].get(kind) == value
    )


def caption_score(scene: Scene, text: str) -> CaptionScore:
    """Scores a caption against its scene.

    Mentions are assigned to objects by `match_mentions`. Claims of an unassigned mention, repeated backgrounds and
    unparsed words are wrong claims. A relation is one claim; it is true if two different objects that fit both phrases
    are in that relation. A caption written from the scene has precision 1; a full caption also has recall 1.
    """
    said = parse_caption(text, grammar_of(scene))
    claims = [dict(mention.claims) for mention in said.mentions for _ in range(mention.count)]
    recalled = _matching(claims, scene)
    recalled["background"] = int(scene.background in said.backgrounds)
    true_relations = sum(
        _relation_holds(scene, said.mentions[a], words, said.mentions[b]) for a, words, b in said.relations
    )
    claimed = sum(map(len, claims)) + len(said.backgrounds) + len(said.relations) + len(said.unparsed)
    there = collections.Counter(name for _, name, _ in facts(scene))
    kinds = {kind: (recalled[kind], there[kind]) for kind in fact_kinds(scene)}
    return CaptionScore(
        recalled.total(), recalled.total() + true_relations, claimed, there.total(), said.unparsed, kinds
    )


def fitting(scene: Scene, claims: tuple[tuple[str, str], ...]) -> list[PlacedObject]:
    """The objects of a scene for which every claim ((name, value), ...) is true."""
    return [item for item in scene.objects if set(claims) <= set(object_facts(item).items())]


def _relation_holds(scene: Scene, first: Mention, words: str, second: Mention) -> bool:
    return any(
        a is not b and holds(words, a, b) for a in fitting(scene, first.claims) for b in fitting(scene, second.claims)
    )


@functools.lru_cache(maxsize=8)
def _cell_templates(side: int) -> tuple[np.ndarray, list[tuple[str, str, str] | None]]:
    """All contents of a cell: images [backgrounds, 1 + shapes * sizes * colours, cell * cell * 3] and their names."""
    cell = side // 2
    names: list[tuple[str, str, str] | None] = [None]
    images = [np.broadcast_to(_GROUNDS[:, None, None, :], (len(_GROUNDS), cell, cell, 3))]
    for shape in SHAPES:
        for size in SIZES:
            mask = coverage(shape, size, 0, 0, side)[:cell, :cell, None]
            for colour, value in zip(COLOURS, _PALETTE):
                names.append((shape, colour, size))
                images.append(_GROUNDS[:, None, None, :] + mask * (value - _GROUNDS[:, None, None, :]))
    return np.stack(images, 1).reshape(len(_GROUNDS), len(names), -1), names


def read_pictures(pixels: np.ndarray) -> list[Scene]:
    """Reads images as scenes: uint8 (or float, 0..255) [B, S, S, 3] with even S to B scenes.

    Every image gets the scene of smallest squared error, with one background for all cells. So noise and blur are
    tolerated. An empty image reads as a scene without objects.

    Raises:
      ValueError: the array is not [B, S, S, 3] with even S.
    """
    check_pictures(pixels)
    templates, names = _cell_templates(pixels.shape[1])
    errors = cell_errors(pixels, templates)
    choice = errors.argmin(-1)
    ground = errors.min(-1).sum(1).argmin(-1)
    return [_scene(int(ground[i]), choice[i, :, ground[i]], names) for i in range(len(pixels))]


def check_pictures(pixels: np.ndarray) -> None:
    """Raises ValueError for images of another shape than [B, S, S, 3] with even S."""
    if pixels.ndim != 4 or pixels.shape[1] != pixels.shape[2] or pixels.shape[3] != 3 or pixels.shape[1] % 2:
        raise ValueError(f"images to read must be [B, S, S, 3] with even S, not {list(pixels.shape)}")


def cell_errors(pixels: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Squared errors between every cell of images and every template, without the cell's energy, a constant.

    Args:
      pixels: images [B, S, S, 3].
      templates: [..., cell * cell * 3].

    Returns:
      float32 [B, 4, ...].
    """
    batch, side = pixels.shape[:2]
    cells = np.asarray(pixels, np.float32).reshape(batch, 2, side // 2, 2, side // 2, 3)
    cells = cells.transpose(0, 1, 3, 2, 4, 5).reshape(batch * 4, -1)
    flat = templates.reshape(-1, templates.shape[-1])
    errors = (flat * flat).sum(-1) - 2 * cells @ flat.T
    return errors.reshape(batch, 4, *templates.shape[:-1])


@functools.singledispatch
def read_like(scene: Scene, pixels: np.ndarray) -> Sequence[Scene]:
    """Reads images [B, S, S, 3] as scenes of the kind of `scene`; other kinds of scenes register their reader."""
    del scene
    return read_pictures(pixels)


def _scene(ground: int, choice: np.ndarray, names: list[tuple[str, str, str] | None]) -> Scene:
    found = [(cell, names[index]) for cell, index in enumerate(choice)]
    return Scene(
        tuple(BACKGROUNDS)[ground],
        tuple(SceneObject(cell // 2, cell % 2, *name) for cell, name in found if name is not None),
    )


def read_picture(pixels: np.ndarray) -> Scene:
    """Reads one image, uint8 [S, S, 3] with even S; see `read_pictures`."""
    return read_pictures(np.asarray(pixels)[None])[0]


def scene_score(scene: Scene, seen: Scene) -> float:
    """Share of the facts of `scene` that `seen` has, with objects matched one to one, in [0, 1]."""
    found = _matching([object_facts(item) for item in seen.objects], scene).total()
    return (found + (seen.background == scene.background)) / len(facts(scene))


def picture_scores(scenes: Sequence[Scene], pixels: np.ndarray) -> np.ndarray:
    """Share in [0, 1] of each scene's facts in its image, for B scenes of one kind: float32 [B]; images [B, S, S, 3].

    An image with additional objects can have 1 too.

    Raises:
      ValueError: different numbers of scenes and images.
    """
    if len(scenes) != len(pixels):
        raise ValueError(f"{len(scenes)} scenes cannot be checked against {len(pixels)} images")
    seen = read_like(scenes[0], pixels) if scenes else []
    return np.array([scene_score(*pair) for pair in zip(scenes, seen)], np.float32)
