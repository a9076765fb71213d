"""Write the plain-English text and the tasks of the demo checkpoint, from a seed and a fixed invented world.

Four kinds of documents are mixed: stories that carry state (who has what, who is where), facts of a closed world
that never changes, small sums, and sentences whose verb agrees with a distant subject.

The split "heldout" never repeats what "train" shows. Besides other seeds, it keeps these combinations to itself:
one phrasing of each fact, one in eight pairs of numbers (for each of plus, minus and counting), one in eight pairs of
a subject noun and the noun that stands between it and its verb, and one in eight pairs of a story's character and
thing. Tasks are drawn from the held-out side only.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

END_TOKEN = "<|endoftext|>"
KINDS = ("recall", "sums", "agreement", "tracking")

# Every eighth combination is kept for the held-out split: enough to test on, too few to starve training.
_HELD_ONE_IN = 8
_WORLD_SEED = 20240607
_LARGEST_NUMBER = 29
_CHOICES = 4


@dataclass(frozen=True)
class Task:
    """One multiple-choice question: the choice at index `answer` should be likeliest after the prompt."""

    kind: str
    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Person:
    """Somebody in a story or in the world, with the pronouns that go with the name."""

    name: str
    she: bool

    @property
    def they(self) -> str:
        """Return the pronoun of a subject."""
        return "she" if self.she else "he"

    @property
    def them(self) -> str:
        """Return the pronoun of an object."""
        return "her" if self.she else "him"

    @property
    def their(self) -> str:
        """Return the possessive pronoun."""
        return "her" if self.she else "his"


@dataclass(frozen=True)
class Fact:
    """One fact of the closed world: what the relation gives for the subject."""

    subject: str
    relation: str
    value: str


# ---------------------------------------------------------------------------------------------------------- words

_WOMEN = """Mira Orla Petra Lena Sanna Tilda Wren Greta Ida Nell Ruth Hana Vera Elsa Dora Faye June Kaya Maud Olive
Polly Rosa Sylvie Thea Una Willa Zoe Anya Bess Clara""".split()
_MEN = """Tomas Edwin Bram Jonah Felix Oskar Piet Rufus Silas Theo Viktor Walt Anders Boris Caleb Dirk Emil Frank
Gus Hugo Ivan Karl Leo Magnus Niels Otto Pavel Quinn Ralf Stefan""".split()
_SURNAMES = """Penhallow Tolland Ashgrove Bracken Corrigan Dunmore Elverton Fenwright Garrowby Hathersage Inglewood
Jessamy Kestrel Lorimer Marchbank Netherby Oakhurst Pellinore Quarrington Ravensby Saltmarsh Thornbury Underhill
Vickery Wetherall Yarrow Zellwood Abernath Birdsall Calloway Drummond Easterby Foxglove Greenhalgh Holloway Ironside
Jarrold Kirkbride Lanyon Merriweather Nightingale Ormsby Prendergast Quickfall Rushworth Skelton Trelawny Upshaw
Venning Winterton Yelland Appleyard Bellweather Cobbledick Dovecote Evergreen Farthing Goldcrest Honeyman Ivory
Jolliffe Knapweed Lavender Moorcroft Nutbrown Otterburn Pinkney Quillfeather Rosewarne Sparrow Tanglewood Umber
Vinegar Whitlock Yewdale Ackroyd Butterworth Cheeseman Dappled Elderberry Flintlock Gooseberry Hollyoak Idlewild
Juniper Kettlewell Larkspur Mandrake Nettleton Osprey Primrose Quince Redfern Snowdrop""".split()
_TOWN_HEADS = "Bran Cor Dun Fal Gar Hol Kel Lor Mar Nor Pen Quar Ros Sel Tor Wyn".split()
_TOWN_TAILS = "ford wick mere holm stead bury dale gate haven mouth".split()
_CREATURES = """snorrel grimble fluffin thackle mubbit dorrow quillop wimbly brackle zander tuffle gloamer nibbet
pardle skimmer hobbin vellick yondle crumpet drizzle falloway gribbon humbert jackle kippen lomber marrip nuzzle
oggle pindle ruffet sprockle tindle wuggle bramble chirrup dapple fennel gossam harrel""".split()

_TRADES = """baker carpenter potter weaver tailor cooper miller fisher teacher doctor gardener painter singer blacksmith
mason sailor printer hunter shepherd clockmaker librarian beekeeper cobbler farmer dancer judge nurse poet
saddler glazier""".split()
_FOODS = """plum cake,pea soup,roast duck,rye bread,goat cheese,apple pie,honey toast,fried trout,barley stew,cherry jam
pickled beets,mushroom tart,lemon curd,ginger biscuits,baked pears,salted butter,chestnut porridge,cream buns
smoked ham,carrot pudding,boiled eggs,walnut bread,turnip mash,raspberry ice""".replace("\n", ",").split(",")
_COLOURS = "red blue green yellow white black brown grey purple orange pink golden silver scarlet violet".split()
_GOODS = """glass,salt,wool,paper,candles,ribbons,bells,knives,barrels,cider,lace,soap,tiles,ropes,kites,drums,clocks
carpets,spoons,boots,lamps,violins,cheese,pepper""".replace("\n", ",").split(",")
_RIVERS = """Arrel Brindle Carrow Dessen Ferrin Gellow Hessel Jorran Kelder Lissen Morrow Nessel Ottery Pell Rindle
Sorrow Tamble Wissen Yarrel Zennor""".split()
_DIETS = """clover,beetles,berries,moss,snails,acorns,grass,worms,seeds,mushrooms,honey,fish,roots,moths,crabs
thistles""".replace("\n", ",").split(",")
_DENS = """hollow logs,deep caves,tall reeds,old chimneys,sandy burrows,pine trees,mossy walls,dry wells,rocky shores
warm haystacks,thick hedges,quiet ponds,church towers,ruined barns""".replace("\n", ",").split(",")

_THINGS = """lantern basket letter key map coin ring book kettle violin blanket hammer bottle candle whistle umbrella
hat scarf mirror clock drum kite rope ladder bucket spoon teapot compass feather shell locket flute notebook pillow
shovel broom bell box jar wheel apple cake loaf brush chain parcel saddle bracelet trumpet vase""".split()
_PLACES = """mill barn harbour market bakery church school library garden orchard bridge tower stable forge inn station
meadow pond farm castle lighthouse museum theatre workshop cottage cellar kitchen well windmill chapel dairy
greenhouse quarry beach cave""".split()
_RELATIVES = "mother father sister brother aunt uncle cousin grandmother grandfather neighbour friend teacher".split()

_NOUNS = """apple arrow badge bag ball banana banner barrel basin bead beam bear bell belt bird boat bone book boot
bottle bowl bracelet branch brick bridge broom brother bucket button cabin camel candle canoe card carpet carrot cart
castle cat chain chair chicken clock cloud coat coin colt corner cousin cow cradle crow crown cup curtain cushion
daughter deck desk dog doll donkey door drawer dream drum duck eagle farmer feather fence field finger flag flower
flute forest fork fountain frog garden garment gate ghost giant gift goat gown grape guest guitar hammer hand hat
hawk hen hill horn horse hotel house insect island jacket jar jewel jug kettle key king kite kitten knot ladder
lake lamb lamp lantern lawyer lemon letter lid lion lizard lock log machine magnet map market mask meadow melon
merchant mirror monkey monster moon mountain mule museum nail napkin necklace needle nest net note nurse oar
officer onion orchard oven owl package page paddle painter palace parrot path pear pebble pen pencil pigeon pillow
pilot pin pipe planet plate plum pocket poem pond pony pot potato prince prize pumpkin puppet puzzle queen rabbit
raft reader rabbit ribbon ring river road robin rock roof room root rope rose ruler sack saddle sailor sail sandal
scarf school seed servant shadow sheet shell ship shirt shoe shop shovel sign sister skirt sled snail sock soldier
son song spider spoon spring stable stamp star statue stick stone stool stove stranger street student swan sword
table tailor teacher temple tent thief thread throne ticket tiger tool towel tower toy train traveller tray treasure
tree trumpet tulip tunnel turkey turtle valley vase village violin visitor wagon wall walnut wheel whistle window
wing wizard worker wound yard""".split()
_ADJECTIVES = """old young small large tiny huge bright dark heavy light quiet loud warm cold wet dry clean dirty soft
hard smooth rough sharp dull sweet sour bitter fresh rotten strange common rare lovely ugly pretty plain simple clever
foolish brave timid gentle fierce kind cruel happy sad angry calm proud humble lazy busy tired hungry thirsty lonely
friendly polite rude honest wise silly careful careless patient famous secret hidden broken empty full open narrow wide
tall short thick thin round square crooked straight steep shallow deep dusty muddy sandy rocky grassy leafy mossy foggy
snowy rainy sunny windy stormy frozen burning shining faded painted wooden iron golden silver copper velvet woollen
leather paper stone clay marble crystal precious cheap costly useless ancient modern local foreign royal sacred
wild tame noisy silent sleepy nervous cheerful gloomy curious anxious eager grateful jealous stubborn generous greedy
loyal shy bold graceful clumsy slender sturdy fragile spotted striped ragged tidy crowded peaceful distant""".split()
_PAST_VERBS = """waited slept rested trembled glittered fell rolled drifted floated vanished appeared whispered shouted
laughed wept smiled frowned danced sang hummed stumbled wandered hurried marched crawled jumped climbed hid listened
watched wondered worked shivered yawned sneezed coughed sighed grumbled chattered giggled snored stretched leaned
knelt swayed creaked rattled glowed sparkled flickered faded melted froze burned dripped splashed bubbled rustled
echoed thundered settled lingered""".split()
_ADVERBS = """quietly loudly slowly quickly gently softly suddenly happily sadly angrily bravely carefully patiently
eagerly calmly proudly lazily sweetly strangely brightly warmly coldly gladly nervously politely silently wildly
peacefully gracefully steadily""".split()
_PRESENT = [("shines", "shine"), ("falls", "fall"), ("waits", "wait"), ("sleeps", "sleep"), ("moves", "move"),
            ("stands", "stand"), ("looks", "look"), ("seems", "seem"), ("grows", "grow"), ("remains", "remain"),
            ("belongs", "belong"), ("appears", "appear"), ("makes", "make"), ("needs", "need"), ("keeps", "keep")]
_BE_AND_HAVE = [("is", "are"), ("was", "were"), ("has", "have")]
_SEASONS = "spring summer autumn winter".split()
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_WEATHER = """rain snow fog wind thunder sunshine frost hail drizzle mist""".split()
_PREPOSITIONS = "near behind beside under above beyond outside around against below".split()

_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen""".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()

_SLOTS: dict[str, Sequence[str]] = {
    "adj": _ADJECTIVES, "noun": _NOUNS, "past": _PAST_VERBS, "adv": _ADVERBS, "season": _SEASONS, "day": _DAYS,
    "weather": _WEATHER, "prep": _PREPOSITIONS, "relative": _RELATIVES, "colour": _COLOURS, "food": _FOODS,
}

# ---------------------------------------------------------------------------------------------------- small helpers

_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")


def fill_template(template: str, rng: random.Random, fixed: dict[str, str] | None = None) -> str:
    """Fill the slots of a template with the fixed words or drawn ones, mend a/an and start with a capital."""
    given = fixed or {}

    def choose(match: re.Match[str]) -> str:
        slot = match.group(1)
        if slot in given:
            return given[slot]
        if slot == "nouns":
            return make_plural(rng.choice(_NOUNS))
        return rng.choice(_SLOTS[slot])

    text = _ARTICLE.sub(r"\1n ", _SLOT.sub(choose, template))
    return text[0].upper() + text[1:]


def make_plural(noun: str) -> str:
    """Return the regular plural of a noun."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun == "thief":
        return "thieves"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh", "potato")) else "s")


def spell_number(number: int) -> str:
    """Return a whole number from 0 to 99 in words."""
    if number < len(_ONES):
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")


def is_held_out(*parts: object) -> bool:
    """Return whether a combination belongs to the held-out split (a stable hash, not Python's)."""
    return zlib.crc32("|".join(map(str, parts)).encode()) % _HELD_ONE_IN == 0


def _chance(rng: random.Random, part: float) -> bool:
    return rng.random() < part


def _draw_person(rng: random.Random) -> Person:
    she = _chance(rng, 0.5)
    return Person(rng.choice(_WOMEN if she else _MEN), she)


def _draw_cast(rng: random.Random, count: int) -> list[Person]:
    names = [Person(name, True) for name in _WOMEN] + [Person(name, False) for name in _MEN]
    return rng.sample(names, count)


# ------------------------------------------------------------------------------------------------ facts of the world

# Each phrasing ends with the value, so that each can be asked; the one kept back differs from fact to fact.
PHRASINGS: dict[str, tuple[str, ...]] = {
    "trade": ("{s} works as a {v}.", "By trade, {s} is a {v}.", "Everyone knows {s} the {v}.",
              "If you ask for {s}, you will meet a {v}.", "What does {s} do? The answer is: {v}."),
    "home": ("{s} lives in {v}.", "The home of {s} is in {v}.", "To visit {s}, you must travel to {v}.",
             "{s} has a small house in {v}.", "Where does {s} live? The answer is: {v}."),
    "food": ("{s} likes nothing better than {v}.", "The favourite food of {s} is {v}.",
             "On holidays {s} always eats {v}.", "If you invite {s} to dinner, serve {v}.",
             "What does {s} like to eat? The answer is: {v}."),
    "river": ("{s} stands on the river {v}.", "The river that runs through {s} is the {v}.",
              "The boats of {s} sail on the {v}.", "Children in {s} swim in the {v}.",
              "Which river flows past {s}? The answer is: {v}."),
    "good": ("{s} is known for its {v}.", "Merchants come to {s} to buy {v}.", "The workshops of {s} make {v}.",
             "The pride of {s} is its {v}.", "What is sold in {s}? The answer is: {v}."),
    "gate": ("The gate of {s} is painted {v}.", "You enter {s} by a gate that is {v}.",
             "The flag of {s}, like its gate, is {v}.", "In {s} every door and gate is {v}.",
             "What colour is the gate of {s}? The answer is: {v}."),
    "fur": ("The fur of the {s} is {v}.", "A {s} can be known by its fur, which is {v}.",
            "When it is grown, the {s} turns {v}.", "The coat of every {s} is {v}.",
            "What colour is a {s}? The answer is: {v}."),
    "diet": ("The {s} eats {v}.", "A hungry {s} looks for {v}.", "The best way to tame a {s} is with {v}.",
             "All day long the {s} feeds on {v}.", "What does a {s} eat? The answer is: {v}."),
    "den": ("The {s} lives in {v}.", "You may find a {s} in {v}.", "In winter the {s} sleeps in {v}.",
            "The {s} raises its young in {v}.", "Where does a {s} live? The answer is: {v}."),
}
_PORTRAITS = {
    "trade": "{They} is a {v}.", "home": "{Their} home is {v}.", "food": "{They} loves {v}.",
    "river": "It lies on the {v}.", "good": "It sells {v}.", "gate": "Its gate is {v}.",
    "fur": "Its fur is {v}.", "diet": "It eats {v}.", "den": "It lives in {v}.",
}
_PORTRAIT_OPENINGS = ("Here is what is known of {s}.", "Let me tell you about {s}.", "This page is about {s}.",
                      "Many tales are told of {s}.", "Do you know {s}?")
_FACT_LINKS = ("", "", "", "It is well known: ", "Remember this: ", "The old book says: ", "People say: ")


def _build_people(rng: random.Random, towns: list[str]) -> tuple[list[Person], list[Fact]]:
    people, facts = [], []
    for surname in _SURNAMES:
        first = _draw_person(rng)
        person = Person(f"{first.name} {surname}", first.she)
        people.append(person)
        facts += [Fact(person.name, "trade", rng.choice(_TRADES)), Fact(person.name, "home", rng.choice(towns)),
                  Fact(person.name, "food", rng.choice(_FOODS))]
    return people, facts


def _build_places_and_creatures(rng: random.Random, towns: list[str]) -> list[Fact]:
    facts = []
    for town in towns:
        facts += [Fact(town, "river", rng.choice(_RIVERS)), Fact(town, "good", rng.choice(_GOODS)),
                  Fact(town, "gate", rng.choice(_COLOURS))]
    for creature in _CREATURES:
        facts += [Fact(creature, "fur", rng.choice(_COLOURS)), Fact(creature, "diet", rng.choice(_DIETS)),
                  Fact(creature, "den", rng.choice(_DENS))]
    return facts


_WORLD_RNG = random.Random(_WORLD_SEED)
TOWNS = sorted(_WORLD_RNG.sample([head + tail for head in _TOWN_HEADS for tail in _TOWN_TAILS], 48))
PEOPLE, _PEOPLE_FACTS = _build_people(_WORLD_RNG, TOWNS)
FACTS: tuple[Fact, ...] = (*_PEOPLE_FACTS, *_build_places_and_creatures(_WORLD_RNG, TOWNS))
_FACTS_PER_SUBJECT = 3
_PERSON_OF = {person.name: person for person in PEOPLE}


def find_held_phrasing(fact: Fact) -> int:
    """Return the index of the phrasing in which training never tells this fact."""
    return zlib.crc32(f"{fact.subject}|{fact.relation}".encode()) % len(PHRASINGS[fact.relation])


def tell_fact(fact: Fact, phrasing: int) -> str:
    """Return one sentence that tells the fact in the phrasing of that index."""
    template = PHRASINGS[fact.relation][phrasing]
    sentence = _ARTICLE.sub(r"\1n ", template.replace("{s}", fact.subject).replace("{v}", fact.value))
    return sentence[0].upper() + sentence[1:]


def _draw_phrasing(fact: Fact, rng: random.Random, split: str) -> int:
    held = find_held_phrasing(fact)
    if split == "heldout":
        return held
    return rng.choice([index for index in range(len(PHRASINGS[fact.relation])) if index != held])


def _write_fact_list(rng: random.Random, split: str) -> str:
    facts = rng.sample(FACTS, rng.randint(3, 8))
    return " ".join(rng.choice(_FACT_LINKS) + tell_fact(fact, _draw_phrasing(fact, rng, split)) for fact in facts)


def _write_portrait(rng: random.Random, split: str) -> str:
    """Tell all facts of one subject; held-out portraits use the phrasing kept back instead of pronouns."""
    start = rng.randrange(len(FACTS) // _FACTS_PER_SUBJECT) * _FACTS_PER_SUBJECT
    facts = list(FACTS[start:start + _FACTS_PER_SUBJECT])
    rng.shuffle(facts)
    subject = facts[0].subject
    shown = f"the {subject}" if subject in _CREATURES else subject
    lines = [rng.choice(_PORTRAIT_OPENINGS).replace("{s}", shown)]
    for fact in facts:
        lines.append(_tell_with_pronoun(fact) if split == "train" and _chance(rng, 0.5)
                     else tell_fact(fact, _draw_phrasing(fact, rng, split)))
    return " ".join(lines)


def _tell_with_pronoun(fact: Fact) -> str:
    person = _PERSON_OF.get(fact.subject)
    words = {"v": fact.value}
    if person:
        words |= {"They": person.they.capitalize(), "Their": person.their.capitalize()}
    return _PORTRAITS[fact.relation].format(**words)


def _write_facts(rng: random.Random, split: str) -> str:
    return _write_portrait(rng, split) if _chance(rng, 0.35) else _write_fact_list(rng, split)


def _ask_recall(rng: random.Random) -> Task:
    fact = rng.choice(FACTS)
    prompt, _, _ = tell_fact(fact, find_held_phrasing(fact)).rpartition(f" {fact.value}.")
    values = sorted({other.value for other in FACTS if other.relation == fact.relation} - {fact.value})
    return _make_task("recall", prompt, f" {fact.value}.", [f" {value}." for value in values], rng)


def _make_task(kind: str, prompt: str, right: str, wrong: Sequence[str], rng: random.Random) -> Task:
    choices = [right, *rng.sample(wrong, min(_CHOICES - 1, len(wrong)))]
    rng.shuffle(choices)
    return Task(kind, prompt, tuple(choices), choices.index(right))


# --------------------------------------------------------------------------------------------------------------- sums

_SUM_PHRASES = {"plus": ("{a} plus {b} is {c}.", "{a} and {b} make {c}.", "If you add {b} to {a}, you get {c}."),
                "minus": ("{a} minus {b} is {c}.", "{a} less {b} leaves {c}.",
                          "If you take {b} from {a}, you get {c}.")}
_SUM_STORIES = {
    "plus": ("{name} has {a} {nouns}. {They} finds {b} more. Now {they} has {c}.",
             "There are {a} {nouns} on the table and {b} on the floor. Together that is {c}."),
    "minus": ("{name} has {a} {nouns}. {They} gives away {b}. Now {they} has {c}.",
              "There were {a} {nouns} in the {noun}. Then {b} were lost. The number left is {c}."),
}


def _draw_sum(rng: random.Random, split: str) -> tuple[str, int, int, int]:
    while True:
        operation = rng.choice(("plus", "minus"))
        low, high = sorted((rng.randint(0, _LARGEST_NUMBER), rng.randint(0, _LARGEST_NUMBER)))
        if is_held_out(operation, low, high) == (split == "heldout"):
            break
    if operation == "minus":
        return operation, high, low, high - low
    left, right = (low, high) if _chance(rng, 0.5) else (high, low)
    return operation, left, right, left + right


def _write_sum(rng: random.Random, split: str) -> str:
    operation, left, right, result = _draw_sum(rng, split)
    shown = spell_number if _chance(rng, 0.25) else str
    words = dict(zip("abc", map(shown, (left, right, result)), strict=True))
    person = _draw_person(rng)
    words |= {"name": person.name, "they": person.they, "They": person.they.capitalize()}
    phrases = _SUM_STORIES if _chance(rng, 0.3) else _SUM_PHRASES
    return fill_template(rng.choice(phrases[operation]), rng, words)


def _write_count(rng: random.Random, split: str) -> str:
    while True:
        start, step = rng.randint(0, _LARGEST_NUMBER), rng.choice((1, 1, 2, 3, 5, 10, -1, -2))
        length = rng.randint(4, 7)
        if start + step * length in range(100) and is_held_out("count", start, step) == (split == "heldout"):
            break
    shown = spell_number if _chance(rng, 0.25) else str
    numbers = ", ".join(shown(start + step * turn) for turn in range(length))
    way = "on" if step > 0 else "back"
    return f"Counting {way} by {spell_number(abs(step))}: {numbers}."


def _write_sums(rng: random.Random, split: str) -> str:
    return "\n".join(_write_count(rng, split) if _chance(rng, 0.15) else _write_sum(rng, split)
                     for _ in range(rng.randint(4, 10)))


def _ask_sum(rng: random.Random) -> Task:
    operation, left, right, result = _draw_sum(rng, "heldout")
    phrase = rng.choice(_SUM_PHRASES[operation])
    sentence = phrase.format(a=left, b=right, c=result)
    near = {result + shift for shift in (-10, -2, -1, 1, 2, 10)} - {result}
    wrong = [f" {number}." for number in sorted(near) if number >= 0]
    return _make_task("sums", sentence.removesuffix(f" {result}."), f" {result}.", wrong, rng)


# ---------------------------------------------------------------------------------------------------------- agreement

# {n} is the noun between subject and verb; the clauses chain, so the distance grows.
_CLAUSES = ("that {who} found near the {n}", "that {who} bought from the {n}", "{prep} the {n}",
            "that stood {prep} the {n}", "which {who} had hidden from the {n}", "with the {n} that {who} made",
            "from the house of the {n}", "that {who} always kept for the {n}", "of the {n} in the {adj} {noun}")
_WHO = ("the {adj} farmer", "the {relative}", "the {adj} children", "my {relative}", "the sailors", "{name}",
        "the {adj} king", "our neighbours")
_COMPLEMENTS = {
    "be": ("{adj} and {adj}.", "as {adj} as ever.", "very {adj}.", "not {adj} any more.", "{prep} the {noun} again."),
    "have": ("a {adj} colour.", "no {noun} at all.", "a {noun} of {colour} {noun}.", "lost something {adj}."),
    "do": ("{adv} in the {weather}.", "{adv} every {day}.", "{adv} {prep} the {noun}.", "to the {adj} {relative}."),
}
_VERB_COMPLEMENTS = {"looks": ("{adj} and {adj}.", "very {adj}."), "seems": ("{adj} and {adj}.", "very {adj}."),
                     "remains": ("{adj}.", "{adj} and {adj}."), "belongs": ("to the {adj} {relative}.",),
                     "makes": ("a {adj} sound.", "the {relative} happy."), "needs": ("a {adj} {noun}.",),
                     "keeps": ("the {noun} warm.",), "appears": ("{adv} every {day}.", "very {adj}.")}


def _draw_agreement(rng: random.Random, split: str) -> tuple[str, tuple[str, str], bool]:
    """Return the subject with its clauses, the two forms of the verb, and whether the subject is plural."""
    while True:
        head, between = rng.sample(_NOUNS, 2)
        if is_held_out("agreement", head, between) == (split == "heldout"):
            break
    plural = _chance(rng, 0.5)
    subject = make_plural(head) if plural else head
    # Two times in three the noun in between disagrees, so that copying the nearest number fails.
    differs = _chance(rng, 0.67)
    parts = [f"the {rng.choice(_ADJECTIVES)} {subject}" if _chance(rng, 0.4) else f"the {subject}"]
    for _ in range(rng.choice((1, 1, 2))):
        shown = make_plural(between) if plural != differs else between
        words = {"n": shown, "who": fill_template(rng.choice(_WHO), rng, {"name": rng.choice(_WOMEN + _MEN)})}
        if words["who"].startswith(("The", "My", "Our")):
            words["who"] = words["who"][0].lower() + words["who"][1:]
        clause = fill_template(rng.choice(_CLAUSES), rng, words)
        parts.append(clause[0].lower() + clause[1:])
        between = _draw_between(rng, head, split)
    verb = rng.choice(_BE_AND_HAVE if _chance(rng, 0.6) else _PRESENT)
    return fill_template(" ".join(parts), rng), verb, plural


def _draw_between(rng: random.Random, head: str, split: str) -> str:
    while True:
        between = rng.choice(_NOUNS)
        if between != head and is_held_out("agreement", head, between) == (split == "heldout"):
            return between


def _write_agreement_sentence(rng: random.Random, split: str) -> str:
    subject, verb, plural = _draw_agreement(rng, split)
    kind = {"is": "be", "was": "be", "has": "have"}.get(verb[0], "do")
    ending = rng.choice(_VERB_COMPLEMENTS.get(verb[0], _COMPLEMENTS[kind]))
    return fill_template(f"{subject} {verb[plural]} {ending}", rng)


def _write_agreement(rng: random.Random, split: str) -> str:
    return " ".join(_write_agreement_sentence(rng, split) for _ in range(rng.randint(2, 6)))


def _ask_agreement(rng: random.Random) -> Task:
    subject, verb, plural = _draw_agreement(rng, "heldout")
    return _make_task("agreement", subject, f" {verb[plural]}", [f" {verb[not plural]}"], rng)


# ------------------------------------------------------------------------------------------------------------- stories

_OPENINGS = ("Once, in {town}, there lived {one}, {two} and {three}.",
             "This is a story about {one}, {two} and {three}, who lived in {town}.",
             "One {season} morning in {town}, {one}, {two} and {three} had nothing to do.",
             "It was a {adj} {day} in {town}, and {one}, {two} and {three} were up early.",
             "Long ago, three friends lived near {town}: {one}, {two} and {three}.")
_STARTS = ("{who} was at the {place}.", "{who} was working at the {place}.", "{who} sat at the {place}.",
           "You could find {who} at the {place}.")
_LYING = ("A {adj} {thing} lay at the {place}.", "Somebody had forgotten a {thing} at the {place}.",
          "There was a {adj} {thing} at the {place}.")
_OWNED = ("{who} had a {adj} {thing}.", "{who} owned a {thing}.", "{who} carried a {adj} {thing}.")
_MOVES = ("{who} went to the {place}.", "{who} walked to the {place}.", "{who} ran {adv} to the {place}.",
          "After a while {who} went to the {place}.", "Then {who} hurried to the {place}.",
          "Because of the {weather}, {who} moved to the {place}.")
_TAKES = ("{who} picked up the {thing}.", "{who} took the {thing}.", "{who} saw the {thing} and took it.",
          "Then {who} lifted the {thing} and kept it.")
_LEAVES = ("{who} left the {thing} there.", "{who} put the {thing} down.", "Then {who} dropped the {thing}.",
           "{who} grew tired of the {thing} and left it there.")
_GIVES = ("{who} gave the {thing} to {other}.", "{who} handed the {thing} to {other}.",
          "{who} sold the {thing} to {other}.", "Then {who} offered the {thing} to {other}, who took it gladly.")
_FEELINGS = ("{who} felt {adj}.", "{who} was {adj} and {adj} that day.", "{who} missed {their} {relative}.",
             "{who} thought about {food} and smiled.", '"What a {adj} {noun}!" said {who}.',
             '"I am so {adj}," said {who} {adv}.', "{who} hummed a {adj} song about a {noun}.",
             "{who} wanted to show {their} {relative} the {adj} {noun}.")
_FLAVOURS = ("The {adj} {noun} {past} {adv}.", "{nouns} {past} {prep} the {noun}.", "The {weather} came {adv}.",
             "A {adj} {noun} {past} {prep} the {adj} {noun}.", "Somewhere a {noun} {past}, and the {nouns} {past}.",
             "It was a {adj} {season}, full of {weather}.", "Nobody noticed the {adj} {noun} {prep} the {noun}.",
             "The {nouns} were {adj}, but the {noun} was {adj}.")
_CLOSINGS = ("When night fell,", "In the end,", "At the end of the day,", "When it was all over,", "At last,")
_MORALS = ("And so the {day} ended {adv}.", "They all went to bed {adj} and {adj}.", "That was a {adj} {day}.",
           "And the {relative} of {one} laughed {adv}.", "From then on, {one} and {two} were {adj} friends.", "")
_STATEMENTS = {"thing": "the {thing} was at the", "holder": "the {thing} was in the hands of",
               "person": "{name} was at the"}


@dataclass
class _Scene:
    """The state of a story while it is told: who is where, who holds what, what has been said."""

    rng: random.Random
    cast: list[Person]
    things: list[str]
    places: list[str]
    at: dict[str, str] = field(default_factory=dict)
    holder: dict[str, Person | None] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    last: Person | None = None


def _open_scene(rng: random.Random, split: str) -> _Scene:
    while True:
        cast, things = _draw_cast(rng, 3), rng.sample(_THINGS, 2)
        held = any(is_held_out("story", person.name, thing) for person in cast for thing in things)
        if held == (split == "heldout"):
            break
    scene = _Scene(rng, cast, things, rng.sample(_PLACES, 4))
    names = dict(zip(("one", "two", "three"), (person.name for person in cast), strict=True))
    scene.lines.append(fill_template(rng.choice(_OPENINGS), rng, names | {"town": rng.choice(TOWNS)}))
    for person, place in zip(cast, scene.places, strict=False):
        _say(scene, _STARTS, person, {"place": place})
        scene.at[person.name] = place
    _place_things(scene)
    return scene


def _place_things(scene: _Scene) -> None:
    for thing in scene.things:
        if _chance(scene.rng, 0.5):
            owner = scene.rng.choice(scene.cast)
            _say(scene, _OWNED, owner, {"thing": thing})
            scene.holder[thing] = owner
        else:
            scene.at[thing] = scene.rng.choice(scene.places)
            _tell(scene, _LYING, {"thing": thing, "place": scene.at[thing]})
            scene.holder[thing] = None


def _say(scene: _Scene, templates: Sequence[str], person: Person, words: dict[str, str]) -> None:
    """Add a sentence about the person, with a pronoun now and then when the last sentence was about them too."""
    template = scene.rng.choice(templates)
    same = scene.last == person and _chance(scene.rng, 0.6) and not template.startswith("You")
    who = person.they if same else person.name
    scene.lines.append(fill_template(template, scene.rng, words | {"who": who, "their": person.their}))
    scene.last = person


def _tell(scene: _Scene, templates: Sequence[str], words: dict[str, str] | None = None) -> None:
    scene.lines.append(fill_template(scene.rng.choice(templates), scene.rng, words))
    scene.last = None


def _find_place(scene: _Scene, thing: str) -> str:
    holder = scene.holder[thing]
    return scene.at[holder.name if holder else thing]


def _move_person(scene: _Scene, person: Person, place: str) -> None:
    if scene.at[person.name] != place:
        _say(scene, _MOVES, person, {"place": place})
        scene.at[person.name] = place


def _move_somebody(scene: _Scene) -> None:
    # Whoever carries something walks more often: the thing then moves without being named.
    holders = [holder for holder in scene.holder.values() if holder]
    person = scene.rng.choice(holders + scene.cast)
    _move_person(scene, person, scene.rng.choice(scene.places))


def _pass_thing(scene: _Scene) -> None:
    """Let a thing be taken when it lies somewhere, and be given away or left when somebody holds it."""
    thing = scene.rng.choice(scene.things)
    holder = scene.holder[thing]
    if holder is None:
        person = scene.rng.choice(scene.cast)
        _move_person(scene, person, scene.at[thing])
        _say(scene, _TAKES, person, {"thing": thing})
        scene.holder[thing] = person
    elif _chance(scene.rng, 0.35):
        _say(scene, _LEAVES, holder, {"thing": thing})
        scene.holder[thing], scene.at[thing] = None, scene.at[holder.name]
    else:
        other = scene.rng.choice([person for person in scene.cast if person != holder])
        _move_person(scene, holder, scene.at[other.name])
        _say(scene, _GIVES, holder, {"thing": thing, "other": other.name})
        scene.holder[thing] = other


def _play_scene(scene: _Scene) -> None:
    steps: list[Callable[[_Scene], None]] = [_move_somebody, _pass_thing]
    for _ in range(scene.rng.randint(2, 6)):
        scene.rng.choice(steps)(scene)
        # A quarter of the steps adds a feeling, a quarter adds something that changes nothing.
        aside = scene.rng.randrange(4)
        if aside == 0:
            _say(scene, _FEELINGS, scene.last or scene.rng.choice(scene.cast), {})
        elif aside == 1:
            _tell(scene, _FLAVOURS)


def _draw_statement(scene: _Scene, about: str) -> tuple[str, str]:
    """Return the start of a true sentence about the last state, and the word that completes it."""
    rng = scene.rng
    thing, person = rng.choice(scene.things), rng.choice(scene.cast)
    holder = scene.holder[thing]
    if about == "holder" and holder is None:
        about = "thing"
    words = {"thing": thing, "name": person.name}
    opening = f"{rng.choice(_CLOSINGS)} {_STATEMENTS[about].format(**words)}"
    if about == "holder":
        assert holder is not None
        return opening, holder.name
    return opening, scene.at[person.name] if about == "person" else _find_place(scene, thing)


def _close_scene(scene: _Scene) -> None:
    kinds = scene.rng.sample(("thing", "holder", "person", "thing", "holder"), scene.rng.randint(2, 3))
    for about in kinds:
        opening, value = _draw_statement(scene, about)
        scene.lines.append(f"{opening} {value}.")
    words = {"one": scene.cast[0].name, "two": scene.cast[1].name}
    moral = scene.rng.choice(_MORALS)
    if moral:
        scene.lines.append(fill_template(moral, scene.rng, words))


def _write_story(rng: random.Random, split: str) -> str:
    scene = _open_scene(rng, split)
    _play_scene(scene)
    _close_scene(scene)
    return " ".join(scene.lines)


def _ask_tracking(rng: random.Random) -> Task:
    scene = _open_scene(rng, "heldout")
    _play_scene(scene)
    opening, value = _draw_statement(scene, rng.choice(("thing", "holder", "person")))
    told = " ".join(scene.lines)
    people = [person.name for person in scene.cast]
    rivals = people if value in people else [place for place in scene.places if f" {place}." in told]
    wrong = [f" {rival}." for rival in rivals if rival != value]
    return _make_task("tracking", f"{told} {opening}", f" {value}.", rng.sample(wrong, 2), rng)


# ---------------------------------------------------------------------------------------------------------- interface

# Weights by document; stories are several times longer, so by length they are about half of the text.
_WRITERS: tuple[tuple[Callable[[random.Random, str], str], float], ...] = (
    (_write_story, 0.32), (_write_facts, 0.34), (_write_sums, 0.19), (_write_agreement, 0.15))
_ASKERS: dict[str, Callable[[random.Random], Task]] = {
    "recall": _ask_recall, "sums": _ask_sum, "agreement": _ask_agreement, "tracking": _ask_tracking}


def _check_split(split: str) -> None:
    if split not in ("train", "heldout"):
        raise ValueError(f'The split is "train" or "heldout", not "{split}".')


def write_documents(count: int, seed: int, split: str = "train") -> Iterator[str]:
    """Yield `count` documents of all kinds; the same seed and split give the same ones (ValueError: no such split)."""
    _check_split(split)
    rng = random.Random(f"{split}-{seed}")
    writers, weights = zip(*_WRITERS, strict=True)
    for _ in range(count):
        yield rng.choices(writers, weights)[0](rng, split)


def write_text(characters: int, seed: int, split: str = "train") -> str:
    """Return whole documents of at least that many characters, the end token on a line of its own after each."""
    parts: list[str] = []
    length = 0
    for document in write_documents(max(characters, 1), seed, split):
        if length >= characters:
            break
        parts.append(f"{document}\n{END_TOKEN}\n")
        length += len(parts[-1])
    return "".join(parts)


def write_tasks(kind: str, count: int, seed: int) -> list[Task]:
    """Return `count` held-out tasks of one of KINDS, the same for the same seed (ValueError: no such kind)."""
    if kind not in _ASKERS:
        raise ValueError(f"No tasks of the kind {kind}; there are {', '.join(KINDS)}.")
    rng = random.Random(f"{kind}-{seed}")
    return [_ASKERS[kind](rng) for _ in range(count)]
