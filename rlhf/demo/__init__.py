"""A small closed English world, its data generator and the judge that scores replies in it.

Everything is made from the tables in this package and a seed, so the committed files under `data/demo` can be rebuilt
byte for byte. The judge (`gold`) stands for what people really want; only evaluation and the generator may import it.
"""
