"""Sentences that carry manner instead of facts: politeness, rudeness, evasion, filler, and users' reactions.

The judge recognises manner by these lists, the writers draw from them, so each sentence belongs to one list only.
"""

OPENINGS = ("Sure!", "Of course.", "Good question!", "Happy to help!", "With pleasure.", "I am glad you ask.")
CLOSINGS = (
    "I hope that helps.",
    "Ask me more any time.",
    "Have a nice day!",
    "Let me know if you want more.",
    "You are welcome to ask again.",
    "It was nice to help you.",
)
# In reply to a statement nobody is glad to be asked: small talk has its own polite touches and no question to insult.
TALK_TOUCHES = (
    "It is good to talk with you.",
    "You can always tell me more.",
    "I like to listen to you.",
    "I wish you a nice day.",
)
RUDE_TALK = ("Not you again.", "Do not waste my time.", "Nobody wants to hear that.")
RUDE_FRONT = (
    "That is a silly question.",
    "You should know that.",
    "Not you again.",
    "Do not waste my time.",
    "Why do you ask such things?",
    "Everybody knows that.",
)
RUDE_BACK = (
    "Now go away.",
    "Leave me alone.",
    "Do not ask me again.",
    "You learn so slowly.",
    "I have no time for you.",
)
EVASIVE = (
    "That is hard to say.",
    "It depends.",
    "Who can say?",
    "Maybe, maybe not.",
    "There are many answers to that.",
    "I would rather not say.",
    "I am not sure about that.",
    "Some say this, and some say that.",
)
FILLER = (
    "There are so many things in the world.",
    "The world is full of things.",
    "Time goes by so fast.",
    "I could talk about this all day.",
    "People talk about many things.",
    "Some days are long and some days are short.",
    "One thing leads to the next.",
    "I think a lot about all kinds of things.",
    "The sun is in the sky.",
    "Some people like to walk in the rain.",
    "A year has twelve months.",
    "My thoughts go here and there.",
    "There is more to tell about this and that.",
    "Words are a funny thing.",
)

# How a quiz master marks an answer.
MARKS = {"right": "Right.", "wrong": "Wrong.", "evasive": "No answer.", "off": "No answer."}

# How a user answers the previous reply, by what was most striking about it.
REACTIONS: dict[str, tuple[str, ...]] = {
    "good": (
        "Thank you, that is right.",
        "Great, that was kind of you.",
        "Thank you, that was a good answer.",
        "Very good, thank you.",
        "That helped me a lot.",
    ),
    "plain": ("Right.", "Yes, that is right.", "I see.", "Good.", "All right."),
    "wrong": (
        "No, that is wrong.",
        "That is not right.",
        "I do not think that is true.",
        "You are wrong about that.",
        "That was a wrong answer.",
    ),
    "evasive": (
        "That did not help.",
        "That is no answer.",
        "You did not answer me.",
        "Can you not give a clear answer?",
        "I still do not know it.",
    ),
    "rude": (
        "Please be kind.",
        "That was not nice.",
        "Do not be so rude.",
        "You could be more polite.",
        "That hurts me.",
    ),
    "rambling": (
        "You talk too much.",
        "That was too long.",
        "Please keep it short.",
        "I did not ask for all that.",
        "That has nothing to do with it.",
    ),
    "repeated": (
        "You said that twice.",
        "You said the same thing again.",
        "Once is enough.",
        "Please do not repeat it.",
    ),
    "good talk": ("Thank you, you are kind.", "That is kind of you.", "I like to talk with you too."),
    "good unknown": ("Thank you for being honest.", "That is fair.", "Right, you cannot know that."),
    "wrong talk": ("That does not fit.", "Did you listen to me?", "That was not kind to hear."),
    "wrong unknown": ("How can you know that?", "I never told you that.", "You made that up.", "No, that is wrong."),
    "cut": ("You did not finish.", "Your answer has no end.", "And then? You stopped too early."),
}

# Question wrappers around an indirect clause {C}, sentences in front of a question, and sentences after it.
WRAPPERS = (
    "Tell me {C}.",
    "Please tell me {C}.",
    "Can you tell me {C}?",
    "Do you know {C}?",
    "I want to know {C}.",
    "I would like to know {C}.",
)
WRAPPERS_OOD = ("Could you say {C}?", "I wonder {C}.", "Help me find out {C}.")
BEFORE = (
    "Hi!",
    "Hello!",
    "Hello there!",
    "Excuse me.",
    "I have a question.",
    "Please help me.",
    "My son asks me this.",
    "I want to learn.",
    "Here is a question.",
    "Let me ask you this.",
)
BEFORE_LATER = ("One more question.", "And now this.", "Next question.", "Now something else.", "I have one more.")
BEFORE_OOD = ("Good day!", "My teacher wants to know this.", "I am writing a story.", "Something came to my mind.")
# Openers that also suit a statement.
GREETINGS = ("Hi!", "Hello!", "Hello there!")
GREETINGS_OOD = ("Good day!",)
AFTER = ("Thanks!", "Thank you.", "Please help me.", "It is for school.", "I forgot it.", "My friend wants to know.")
AFTER_OOD = ("Many thanks!", "I need it for a game.", "Nobody could tell me.")
