"""Names for runs: an adjective and an animal or plant out of 64 each, chosen by a number.

Owns the word lists. config imports it; it imports nothing.
"""

_ADJECTIVES = """
    amber ample azure bold brave bright brisk calm candid clear clever copper coral cosmic crisp
    curious daring dapper deft eager early earnest fabled fair fleet fresh frosty gentle gilded
    glad golden grand hardy hazel honest humble ivory jolly keen kind lively lucid lunar mellow
    merry mighty misty nimble noble patient plucky polar quick quiet rapid robust rosy sage scarlet
    serene silver steady sunny swift
"""

_NOUNS = """
    alder aspen badger beaver birch bison cedar condor crane curlew dolphin eagle egret elk
    falcon fern finch fox gannet gecko hare hawk hazelnut heron ibex ibis jackdaw jay kestrel koala
    lark lemur linden lynx magpie maple marlin marmot marten mole newt ocelot orca osprey otter owl
    panda pelican pine plover puffin quail raven robin salmon seal sparrow spruce stork swan tapir
    thrush walnut wren
"""
ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())


def slug(number: int) -> str:
    """`adjective-noun` for a number; the 4,096 numbers from 0 give different names, then repeat."""
    which, noun = divmod(number % (len(ADJECTIVES) * len(NOUNS)), len(NOUNS))
    return f"{ADJECTIVES[which]}-{NOUNS[noun]}"
