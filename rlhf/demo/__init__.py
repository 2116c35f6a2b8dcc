"""The demo task: a small closed English world, its data generator and the judge that scores replies.

Everything is made from the tables in this package and a seed, so the committed files under `data/demo` can be rebuilt
byte for byte. The judge (`gold`) stands for the true preferences of people; only evaluation and the generator may
import it.
"""
