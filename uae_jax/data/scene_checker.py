"""Exact checks against the ground truth: a caption, or a picture, of a scene turned back into facts.

Captions are parsed with the grammar of `scene_captions`; pictures are read by analysis by synthesis: every cell is
compared with everything that could have been drawn there, on each background.
"""
import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from uae_jax.data.scene_captions import NUMBERS, holds
from uae_jax.data.scenes import (BACKGROUNDS, COLOURS, COLUMNS, ROWS, SHAPES, SIZES, Scene, SceneObject, coverage,
                                 facts, object_facts)

_NOUNS = (*SHAPES, "object")
_OBJECT_KINDS = ("position", "size", "colour", "shape")
FACT_KINDS = ("background", *_OBJECT_KINDS)
_PALETTE = np.array(list(COLOURS.values()), np.float32)
_GROUNDS = np.array(list(BACKGROUNDS.values()), np.float32)


@dataclasses.dataclass(frozen=True)
class Mention:
    """One object that a caption speaks of: its claimed facts as ((name, value), ...), repeated `count` times."""

    claims: tuple[tuple[str, str], ...]
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What a caption says: backgrounds, mentioned objects, relations (first mention, words, second), unparsed words."""

    backgrounds: tuple[str, ...]
    mentions: tuple[Mention, ...]
    relations: tuple[tuple[int, str, int], ...]
    unparsed: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class CaptionScore:
    """Counts of one caption against one scene.

    `recalled`: facts of the scene that are said; `correct`: claims that are true (recalled facts and true relations);
    `claimed`: all claims, unparsed words among them; `total`: facts of the scene; `unparsed`: words outside the grammar;
    `kinds`: of each of `FACT_KINDS` the facts recalled and the facts of the scene.
    """

    recalled: int
    correct: int
    claimed: int
    total: int
    unparsed: tuple[str, ...] = ()
    kinds: tuple[tuple[int, int], ...] = ()

    @property
    def recall_by_kind(self) -> dict[str, float]:
        """`fact_recall` of each of `FACT_KINDS` alone; a kind that the scene does not have is left out."""
        return {kind: said / there for kind, (said, there) in zip(FACT_KINDS, self.kinds) if there}

    @property
    def fact_recall(self) -> float:
        """Share of the scene's facts that the caption says, in [0, 1]."""
        return self.recalled / self.total

    @property
    def fact_precision(self) -> float:
        """Share of the claims that are true, in [0, 1]; 0 for a caption that claims nothing."""
        return self.correct / self.claimed if self.claimed else 0.0


class _Reader:
    """One pass over the words of a clause; `unparsed` collects what does not fit."""

    def __init__(self, words: list[str]):
        self.words, self.at, self.unparsed = words, 0, []

    def peek(self, offset: int = 0) -> str:
        index = self.at + offset
        return self.words[index] if index < len(self.words) else ""

    def relation(self) -> str | None:
        """Takes a relation if one stands here."""
        if self.peek() in ("above", "below"):
            self.at += 1
            return self.words[self.at - 1]
        if self.peek() in COLUMNS and self.peek(1) == "of":
            self.at += 2
            return f"{self.words[self.at - 2]} of"
        return None

    def phrase(self) -> Mention | None:
        """Takes words up to and including a noun, or up to a link; a fact said twice in one phrase is unparsed."""
        claims: dict[str, str] = {}
        count, noun = 1, ""
        numbered = False
        while self.at < len(self.words) and not noun:
            word = self.peek()
            if word == "and" or word in ("above", "below") or (word in COLUMNS and self.peek(1) == "of"):
                break
            self.at += 1
            name, value = "", word
            if word in ROWS and self.peek() in COLUMNS:
                name, value = "position", f"{word} {self.peek()}"
                self.at += 1
            elif word in _NOUNS:
                noun = word
                name = "shape" if word in SHAPES else "noun"
            else:
                name = "size" if word in SIZES else "colour" if word in COLOURS else ""
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


def parse_caption(text: str) -> Parsed:
    """Turns a caption into what it says; anything outside the grammar is returned as unparsed words, never an error."""
    backgrounds, mentions, relations, unparsed = [], [], [], []
    for clause in text.replace(",", " , ").split(" , "):
        words = clause.replace(",", " ").split()
        if len(words) == 2 and words[0] in BACKGROUNDS and words[1] == "background":
            backgrounds.append(words[0])
            continue
        reader = _Reader(words)
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
    """Which mention speaks of which object, one to one, so that most claims are true; of equals, the first mention.

    A dynamic programme over subsets of the objects.

    Args:
      claims: the claimed facts of each mention.
      objects: the facts of each object.

    Returns:
      Mention to object, without mentions that nothing is left for.
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


def _matching(claims: Sequence[Mapping[str, str]], objects: Sequence[SceneObject]) -> tuple[int, ...]:
    """True claims of each kind of `_OBJECT_KINDS` when every mention stands for a different object and most claims are true."""
    known = [object_facts(item) for item in objects]
    pairs = match_mentions(claims, known).items()
    return tuple(sum(claims[number].get(kind) == known[index][kind] for number, index in pairs) for kind in _OBJECT_KINDS)


def caption_score(scene: Scene, text: str) -> CaptionScore:
    """Scores a caption against the scene it describes.

    Mentions are matched to objects one to one so that most claims are true; a claim of an unmatched mention, a
    repeated background and an unparsed word are wrong claims. A relation is one claim, true when two different objects
    that fit both phrases stand in it. A caption written from the scene has precision 1, the full one also recall 1.
    """
    said = parse_caption(text)
    claims = [dict(mention.claims) for mention in said.mentions for _ in range(mention.count)]
    recalled_kinds = (int(scene.background in said.backgrounds), *_matching(claims, scene.objects))
    recalled = sum(recalled_kinds)
    true_relations = sum(_relation_holds(scene, said.mentions[a], words, said.mentions[b])
                         for a, words, b in said.relations)
    claimed = sum(map(len, claims)) + len(said.backgrounds) + len(said.relations) + len(said.unparsed)
    there = (1, *(len(scene.objects),) * len(_OBJECT_KINDS))
    return CaptionScore(
        recalled, recalled + true_relations, claimed, len(facts(scene)), said.unparsed, tuple(zip(recalled_kinds, there)))


def fitting(scene: Scene, claims: tuple[tuple[str, str], ...]) -> list[SceneObject]:
    """The objects of a scene of which every claim ((name, value), ...) is true."""
    return [item for item in scene.objects if set(claims) <= set(object_facts(item).items())]


def _relation_holds(scene: Scene, first: Mention, words: str, second: Mention) -> bool:
    return any(a is not b and holds(words, a, b)
               for a in fitting(scene, first.claims) for b in fitting(scene, second.claims))


@functools.lru_cache(maxsize=8)
def _cell_templates(side: int) -> tuple[np.ndarray, list[tuple[str, str, str] | None]]:
    """Everything a cell can show: pictures [backgrounds, 1 + shapes * sizes * colours, cell * cell * 3] and names."""
    cell = side // 2
    names: list[tuple[str, str, str] | None] = [None]
    pictures = [np.broadcast_to(_GROUNDS[:, None, None, :], (len(_GROUNDS), cell, cell, 3))]
    for shape in SHAPES:
        for size in SIZES:
            mask = coverage(shape, size, 0, 0, side)[:cell, :cell, None]
            for colour, value in zip(COLOURS, _PALETTE):
                names.append((shape, colour, size))
                pictures.append(_GROUNDS[:, None, None, :] + mask * (value - _GROUNDS[:, None, None, :]))
    return np.stack(pictures, 1).reshape(len(_GROUNDS), len(names), -1), names


def read_pictures(pixels: np.ndarray) -> list[Scene]:
    """Reads drawn pictures back: uint8 (or float, 0..255) [B, S, S, 3] with even S to B scenes.

    Every picture gets the scene of smallest squared error among all scenes (backgrounds are shared by the cells), so
    noise and blur are tolerated; an empty picture reads as a scene without objects.

    Raises:
      ValueError: the array is not [B, S, S, 3] with even S.
    """
    if pixels.ndim != 4 or pixels.shape[1] != pixels.shape[2] or pixels.shape[3] != 3 or pixels.shape[1] % 2:
        raise ValueError(f"pictures to read must be [B, S, S, 3] with even S, not {list(pixels.shape)}")
    batch, side = pixels.shape[:2]
    templates, names = _cell_templates(side)
    cells = np.asarray(pixels, np.float32).reshape(batch, 2, side // 2, 2, side // 2, 3)
    cells = cells.transpose(0, 1, 3, 2, 4, 5).reshape(batch * 4, -1)
    flat = templates.reshape(-1, templates.shape[-1])
    # Squared error up to the cell's own energy, which no choice changes.
    errors = (flat * flat).sum(-1) - 2 * cells @ flat.T
    errors = errors.reshape(batch, 4, len(_GROUNDS), len(names))
    choice = errors.argmin(-1)
    ground = errors.min(-1).sum(1).argmin(-1)
    return [_scene(int(ground[i]), choice[i, :, ground[i]], names) for i in range(batch)]


def _scene(ground: int, choice: np.ndarray, names: list[tuple[str, str, str] | None]) -> Scene:
    found = [(cell, names[index]) for cell, index in enumerate(choice)]
    return Scene(tuple(BACKGROUNDS)[ground],
                 tuple(SceneObject(cell // 2, cell % 2, *name) for cell, name in found if name is not None))


def read_picture(pixels: np.ndarray) -> Scene:
    """Reads one picture, uint8 [S, S, 3] with even S; see `read_pictures`."""
    return read_pictures(np.asarray(pixels)[None])[0]


def scene_score(scene: Scene, seen: Scene) -> float:
    """Share of the facts of `scene` that `seen` shows, objects matched one to one, in [0, 1]."""
    found = sum(_matching([object_facts(item) for item in seen.objects], scene.objects))
    return (found + (seen.background == scene.background)) / len(facts(scene))


def picture_score(scene: Scene, pixels: np.ndarray) -> float:
    """Share of the scene's facts found in a picture, uint8 [S, S, 3]; 1 also for a picture that shows more."""
    return scene_score(scene, read_picture(pixels))


def picture_scores(scenes: list[Scene], pixels: np.ndarray) -> np.ndarray:
    """`picture_score` of B scenes and pictures [B, S, S, 3]: float32 [B].

    Raises:
      ValueError: different numbers of scenes and pictures.
    """
    if len(scenes) != len(pixels):
        raise ValueError(f"{len(scenes)} scenes cannot be checked against {len(pixels)} pictures")
    return np.array([scene_score(scene, seen) for scene, seen in zip(scenes, read_pictures(pixels))], np.float32)


def picture_matches(scenes: list[Scene], pixels: np.ndarray) -> np.ndarray:
    """Whether each of B pictures [B, S, S, 3] shows exactly its scene, nothing missing and nothing more: bool [B].

    Raises:
      ValueError: different numbers of scenes and pictures.
    """
    if len(scenes) != len(pixels):
        raise ValueError(f"{len(scenes)} scenes cannot be checked against {len(pixels)} pictures")
    return np.array([scene == seen for scene, seen in zip(scenes, read_pictures(pixels))], bool)
