"""What can be said and asked about an entity: one `Attribute` per property, with its wordings.

Markup: `[is|are]` picks the singular or plural form, `{S}` is the subject ("a cow", "cows", "it"), `{V}` the value as
written in the tables, `{A}` the value as a noun with article ("a mammal" / "mammals"), `{D}` a verb phrase in the third
person ("bakes bread" / "bake bread"). Predicates follow a subject; `frames` are statements whose subject is not in
front. The same strings are rendered by the writers and turned into patterns by the judge's grammar, so the two cannot
drift apart. The last direct question of each attribute is reserved for the out-of-distribution test.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attribute:
    """One property. `yes_no` attributes have the values "yes" and "no", said by `predicates` and `negations`."""

    name: str
    predicates: tuple[str, ...]
    negations: tuple[str, ...]
    questions: tuple[str, ...]
    clauses: tuple[str, ...]
    check: str
    frames: tuple[str, ...] = ()
    yes_no: bool = False


_ROWS: tuple[Attribute, ...] = (
    Attribute(
        "class",
        ("[is|are] {A}", "[is|are] a kind of {V}"),
        ("[is|are] not {A}",),
        ("What kind of thing [is|are] {S}?", "What [is|are] {S}?", "To what group [does|do] {S} belong?"),
        ("what kind of thing {S} [is|are]", "what {S} [is|are]"),
        "[Is|Are] {S} {A}?",
    ),
    Attribute(
        "food",
        ("[eats|eat] {V}", "[likes|like] to eat {V}", "[feeds|feed] on {V}"),
        ("[does|do] not eat {V}",),
        (
            "What [does|do] {S} eat?",
            "What kind of food [does|do] {S} eat?",
            "What [does|do] {S} like to eat?",
            "What [does|do] {S} feed on?",
        ),
        ("what {S} [eats|eat]", "what {S} [likes|like] to eat", "what kind of food {S} [eats|eat]"),
        "[Does|Do] {S} eat {V}?",
        ("the food of {S} is {V}",),
    ),
    Attribute(
        "home",
        ("[lives|live] {V}", "[has|have] a home {V}"),
        ("[does|do] not live {V}",),
        (
            "Where [does|do] {S} live?",
            "In what place [does|do] {S} live?",
            "Where can I find {S}?",
            "Where [does|do] {S} have a home?",
        ),
        ("where {S} [lives|live]", "where I can find {S}"),
        "[Does|Do] {S} live {V}?",
        ("you can find {S} {V}", "the home of {S} is {V}"),
    ),
    Attribute(
        "colour",
        ("[is|are] {V}", "[is|are] {V} in colour"),
        ("[is|are] not {V}",),
        (
            "What colour [is|are] {S}?",
            "Which colour [does|do] {S} have?",
            "What is the colour of {S}?",
        ),
        ("what colour {S} [is|are]", "the colour of {S}"),
        "[Is|Are] {S} {V}?",
        ("the colour of {S} is {V}",),
    ),
    Attribute(
        "size",
        ("[is|are] {V}", "[is|are] {V} in size"),
        ("[is|are] not {V}",),
        ("How big [is|are] {S}?", "[Is|Are] {S} big or small?", "What size [is|are] {S}?"),
        ("how big {S} [is|are]", "if {S} [is|are] big or small"),
        "[Is|Are] {S} {V}?",
    ),
    Attribute(
        "legs",
        ("[has|have] {V}", "[has|have] {V} in all"),
        ("[does|do] not have {V}",),
        (
            "How many legs [does|do] {S} have?",
            "How many legs are there on {S}?",
            "What number of legs [does|do] {S} have?",
        ),
        ("how many legs {S} [has|have]", "the number of legs of {S}"),
        "[Does|Do] {S} have {V}?",
    ),
    Attribute(
        "cover",
        ("[has|have] {V}", "[is|are] covered with {V}"),
        ("[does|do] not have {V}",),
        ("What covers {S}?", "With what [is|are] {S} covered?", "What covers the body of {S}?"),
        ("what covers {S}", "what {S} [is|are] covered with"),
        "[Does|Do] {S} have {V}?",
        ("the body of {S} has {V}",),
    ),
    Attribute(
        "active",
        ("[is|are] awake {V}", "[looks|look] for food {V}", "[is|are] active {V}"),
        ("[is|are] not awake {V}",),
        ("When [is|are] {S} awake?", "When [does|do] {S} look for food?", "At what time [is|are] {S} active?"),
        ("when {S} [is|are] awake", "when {S} [looks|look] for food"),
        "[Is|Are] {S} awake {V}?",
    ),
    Attribute(
        "fly",
        ("can fly", "[is|are] able to fly"),
        ("cannot fly", "[is|are] not able to fly"),
        ("Can {S} fly?", "[Is|Are] {S} able to fly?", "[Does|Do] {S} know how to fly?"),
        ("if {S} can fly", "if {S} [is|are] able to fly"),
        "Can {S} fly?",
        yes_no=True,
    ),
    Attribute(
        "swim",
        ("can swim", "[is|are] able to swim"),
        ("cannot swim", "[is|are] not able to swim"),
        ("Can {S} swim?", "[Is|Are] {S} able to swim?", "[Does|Do] {S} know how to swim?"),
        ("if {S} can swim", "if {S} [is|are] able to swim"),
        "Can {S} swim?",
        yes_no=True,
    ),
    Attribute(
        "sound",
        ("[says|say] {V}", "[makes|make] the sound {V}"),
        ("[does|do] not say {V}",),
        ("What [does|do] {S} say?", "What sound [does|do] {S} make?", "What is the sound of {S}?"),
        ("what {S} [says|say]", "what sound {S} [makes|make]"),
        "[Does|Do] {S} say {V}?",
        ("the sound of {S} is {V}",),
    ),
    Attribute(
        "taste",
        ("[tastes|taste] {V}", "[has|have] a {V} taste"),
        ("[does|do] not taste {V}",),
        ("How [does|do] {S} taste?", "What taste [does|do] {S} have?", "What [does|do] {S} taste like?"),
        ("how {S} [tastes|taste]", "what taste {S} [has|have]"),
        "[Does|Do] {S} taste {V}?",
        ("the taste of {S} is {V}",),
    ),
    Attribute(
        "grows",
        ("[grows|grow] {V}",),
        ("[does|do] not grow {V}",),
        ("Where [does|do] {S} grow?", "In what place [does|do] {S} grow?", "Where can I see {S} grow?"),
        ("where {S} [grows|grow]",),
        "[Does|Do] {S} grow {V}?",
        ("you can see {S} grow {V}",),
    ),
    Attribute(
        "made",
        ("[is|are] made from {V}", "[comes|come] from {V}"),
        ("[is|are] not made from {V}",),
        ("What [is|are] {S} made from?", "From what do people make {S}?", "What [does|do] {S} come from?"),
        ("what {S} [is|are] made from", "what {S} [comes|come] from"),
        "[Is|Are] {S} made from {V}?",
        ("people make {S} from {V}",),
    ),
    Attribute(
        "use",
        ("[is|are] used {V}", "[is|are] good {V}"),
        ("[is|are] not used {V}",),
        (
            "What [is|are] {S} used for?",
            "What do people do with {S}?",
            "What can I do with {S}?",
            "Why do people need {S}?",
        ),
        ("what {S} [is|are] used for", "what people do with {S}", "what I can do with {S}"),
        "[Is|Are] {S} used {V}?",
        ("people use {S} {V}", "you can use {S} {V}"),
    ),
    Attribute(
        "place",
        ("[is|are] kept {V}", "[has|have] a place {V}"),
        ("[is|are] not kept {V}",),
        (
            "Where [is|are] {S} kept?",
            "Where do people keep {S}?",
            "Where can I find {S}?",
            "Where should I look for {S}?",
        ),
        ("where {S} [is|are] kept", "where people keep {S}"),
        "[Is|Are] {S} kept {V}?",
        ("you can find {S} {V}", "people keep {S} {V}"),
    ),
    Attribute(
        "material",
        ("[is|are] made {V}", "[is|are] mostly made {V}"),
        ("[is|are] not made {V}",),
        ("What [is|are] {S} made of?", "Of what [is|are] {S} made?", "What do people make {S} of?"),
        ("what {S} [is|are] made of",),
        "[Is|Are] {S} made {V}?",
        ("people make {S} {V}",),
    ),
    Attribute(
        "wheels",
        ("[has|have] {V}", "[has|have] {V} in all"),
        ("[does|do] not have {V}",),
        (
            "How many wheels [does|do] {S} have?",
            "How many wheels are there on {S}?",
            "What number of wheels [does|do] {S} have?",
        ),
        ("how many wheels {S} [has|have]", "the number of wheels of {S}"),
        "[Does|Do] {S} have {V}?",
    ),
    Attribute(
        "moves",
        ("[moves|move] {V}", "[travels|travel] {V}"),
        ("[does|do] not move {V}",),
        ("Where [does|do] {S} move?", "Where can I see {S} move?", "Where [does|do] {S} travel?"),
        ("where {S} [moves|move]", "where {S} [travels|travel]"),
        "[Does|Do] {S} move {V}?",
        ("you can see {S} move {V}",),
    ),
    Attribute(
        "engine",
        ("[has|have] an engine", "[runs|run] with an engine"),
        ("[has|have] no engine", "[does|do] not have an engine"),
        ("[Does|Do] {S} have an engine?", "[Does|Do] {S} run with an engine?", "Is there an engine in {S}?"),
        ("if {S} [has|have] an engine",),
        "[Does|Do] {S} have an engine?",
        yes_no=True,
    ),
    Attribute(
        "does",
        ("{D}", "[has|have] the job to {V}"),
        ("[does|do] not {V}",),
        (
            "What [does|do] {S} do?",
            "What is the job of {S}?",
            "What [does|do] {S} do all day?",
            "What work [does|do] {S} do?",
        ),
        ("what {S} [does|do]", "what {S} [does|do] all day"),
        "[Does|Do] {S} {V}?",
        ("the job of {S} is to {V}",),
    ),
    Attribute(
        "work",
        ("[works|work] {V}", "[has|have] a job {V}"),
        ("[does|do] not work {V}",),
        (
            "Where [does|do] {S} work?",
            "In what place [does|do] {S} work?",
            "Where can I find {S}?",
            "Where can I meet {S}?",
        ),
        ("where {S} [works|work]", "where I can find {S}"),
        "[Does|Do] {S} work {V}?",
        ("you can find {S} {V}", "you can meet {S} {V}"),
    ),
)

ATTRIBUTES: dict[str, Attribute] = {row.name: row for row in _ROWS}
