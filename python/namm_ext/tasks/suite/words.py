"""Words that facts are made of. Each list is divided once among train, validation and test."""

from __future__ import annotations

import functools
import random

_SHARES = {"train": (0.0, 0.55), "validation": (0.55, 0.75), "test": (0.75, 1.0)}

_LISTS = {
    "first": """Alice Amir Anna Arthur Beatrice Benjamin Boris Carla Carmen Cecilia Claire Daniel
        David Diana Edgar Elena Emma Erik Fatima Felix Fiona Frank George Grace Hannah Harold
        Helen Henry Hugo Ingrid Irene Isaac Ivan Jacob James Jasmine Julia Karen Karl Laura Leo
        Linda Louis Lucy Marcus Maria Martin Maya Michael Nadia Nina Nora Oliver Olga Omar Oscar
        Patricia Paul Peter Philip Rachel Robert Rosa Ruth Samuel Sarah Simon Sofia Stella Thomas
        Ursula Victor Vera Walter William Yusuf Zoe Adam Bruno Clara Dora Elias Flora Gustav""",
    "last": """Adams Andersen Baker Barnes Becker Bennett Brooks Campbell Carter Castillo Chen
        Clarke Cohen Cooper Cruz Dalton Davies Diaz Dixon Dubois Edwards Ellis Evans Ferrari
        Fischer Fleming Foster Garcia Gibson Grant Griffin Hansen Harris Hayes Hoffman Hughes
        Ivanov Jackson Jensen Kaplan Keller Khan Kim Klein Lambert Larsen Lopez Marshall Martinez
        Mason Meyer Mitchell Moreau Morgan Murphy Nelson Novak Olsen Parker Patel Pereira Price
        Quinn Ramirez Reed Rossi Russell Santos Schmidt Silva Sullivan Tanaka Taylor Turner Wagner
        Walsh Weber Wood Young Zimmerman""",
    "adjective": """ancient brave bright broken bitter calm careless cheerful clever clumsy curious
        dusty eager elegant empty faint famous fancy fierce fragile frozen gentle giant gloomy
        golden graceful grumpy hollow honest humble hungry icy jolly lazy lively lonely lucky
        mellow mighty modest muddy narrow nervous noisy patient polite proud puzzled quiet rapid
        rusty salty shiny shy silent silly sleepy slippery smooth spicy steep stormy stubborn
        sturdy sudden swift tender thirsty tiny wild wise witty wooden""",
    "noun": """anchor apron arrow badge balloon banner barrel basket beacon blanket bottle bridge
        bucket button cabin camera candle canoe carpet castle chimney circus clock compass cradle
        curtain desert dragon engine feather fence fountain garden glacier hammer harbor helmet
        island jacket kettle ladder lantern library lighthouse magnet market meadow mirror
        mountain needle oven paddle palace pencil pillow planet puzzle quarry rocket saddle sailor
        shovel statue teapot temple tractor trumpet tunnel umbrella valley village violin wagon
        window""",
    "city": """Paris London Berlin Madrid Rome Vienna Athens Dublin Lisbon Prague Oslo Stockholm
        Helsinki Copenhagen Warsaw Budapest Amsterdam Brussels Zurich Geneva Munich Hamburg Milan
        Venice Naples Barcelona Moscow Istanbul Cairo Tokyo Seoul Beijing Shanghai Delhi Mumbai
        Bangkok Singapore Sydney Melbourne Toronto Montreal Chicago Boston Seattle Denver Houston
        Dallas Miami Atlanta Philadelphia""",
    "job": """baker barber butcher carpenter chemist clerk coach cook dancer dentist detective
        diver doctor driver farmer firefighter fisherman gardener geologist hairdresser journalist
        judge lawyer librarian mechanic miner musician nurse painter photographer pilot plumber
        poet policeman postman potter professor sailor sculptor singer soldier surgeon tailor
        teacher translator waiter writer""",
    "animal": """badger beaver camel cat cow crocodile deer dog dolphin donkey duck falcon ferret
        fox frog goat goldfish goose hamster hawk hedgehog horse lion lizard llama monkey mouse
        parrot penguin pig pigeon pony rabbit raccoon rat sheep snake spider squirrel tiger
        tortoise turkey turtle whale wolf zebra""",
    "food": """bacon bread broccoli cheese cherries chicken chocolate cookies corn dumplings garlic
        grapes honey lasagna lemons mango melon mushrooms noodles olives onions oranges pancakes
        pasta peaches peanuts pears pineapple pizza popcorn potatoes pudding pumpkin rice salad
        salmon sausages shrimp soup spinach steak strawberries sushi tacos tomatoes tuna walnuts
        yogurt""",
    "color": """black blue brown crimson gold gray green maroon orange pink purple red silver
        turquoise violet white yellow beige""",
    "instrument": """accordion bandoneon banjo bassoon cello clarinet drum flute guitar harmonica
        harp horn lute mandolin oboe organ piano saxophone tambourine trombone trumpet tuba
        ukulele viola violin xylophone""",
    "tool": """axe chisel crowbar drill file hammer hatchet ladder lathe mallet pickaxe plane
        pliers rake sander saw screwdriver shovel sickle spade tongs trowel vise wrench wheelbarrow
        scissors""",
    "garment": """apron belt blouse boots cardigan coat dress gloves gown hat hoodie jacket jeans
        kilt mittens pajamas poncho raincoat robe sandals scarf shirt shoes shorts skirt socks
        suit sweater tie trousers vest""",
    "vehicle": """airplane ambulance balloon barge bicycle boat bus canoe car ferry glider
        helicopter kayak limousine lorry motorcycle raft rocket sailboat scooter ship sled
        submarine taxi tractor train tram truck van yacht""",
    "place": """attic basement bathroom cellar closet corridor garage garden hallway kitchen
        laboratory library lobby lounge office pantry porch shed stable studio terrace tower
        vault workshop""",
    "label": """blick boma dax fep gorp hib jat kiki koba lorp mib nuz pim quib rull sorp
        teeb tolm vash vek wug yeb zif zup""",
    "identifier": """address archive backup batch block bucket buffer cache channel client cluster
        column counter cursor delay device domain engine filter folder handler header index job
        layer ledger limit lock message mirror module network node offset packet page parser
        payload pool port proxy queue record region replica request retry route row schema sector
        segment sensor server session shard signal socket stage storage stream table task thread
        ticket timeout token tracker upload user vector volume window worker zone""",
}

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


@functools.cache
def words(name: str, split: str) -> tuple[str, ...]:
    """The words of a list that belong to a split, in a fixed random order."""
    everything = _LISTS[name].split()
    random.Random(name).shuffle(everything)
    low, high = (round(share * len(everything)) for share in _SHARES[split])
    return tuple(everything[low:high])


def people(rng: random.Random, split: str, count: int) -> list[str]:
    """Different people, no two of whom share a first or a last name."""
    first, last = (rng.sample(words(name, split), count) for name in ("first", "last"))
    return [f"{a} {b}" for a, b in zip(first, last, strict=True)]


def things(rng: random.Random, split: str, count: int) -> list[str]:
    """Different things, such as "rusty lantern"; no two share a word."""
    adjectives, nouns = (rng.sample(words(name, split), count) for name in ("adjective", "noun"))
    return [f"{a} {b}" for a, b in zip(adjectives, nouns, strict=True)]


def numbers(rng: random.Random, digits: int, count: int) -> list[str]:
    """Different numbers of so many digits."""
    return [str(n) for n in rng.sample(range(10 ** (digits - 1), 10**digits), count)]
