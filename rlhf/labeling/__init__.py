"""Creation of labels: weak labels from the votes of rules, functions and annotators, and the demo's simulated rater.

The training on these labels is in `stages`.
"""
