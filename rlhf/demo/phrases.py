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

# How a user judges the previous reply, by whether it answers what was asked.
VERDICTS: dict[str, tuple[str, ...]] = {
    "right fact": ("Right.", "Right.", "Right, thank you.", "Right, that is true."),
    "wrong fact": ("Wrong.", "Wrong.", "Wrong, that is not true.", "Wrong, I know better."),
    "missing fact": ("No answer.", "No answer.", "No answer, and I still do not know it."),
    "right talk": ("Right, you are kind.", "Right, I like to talk with you."),
    "wrong talk": ("Wrong, that does not fit.", "Wrong, did you listen to me?"),
    "missing talk": ("No answer.", "No answer, did you listen to me?"),
    "right unknown": ("Right, you cannot know that.", "Right, thank you for being honest."),
    "wrong unknown": ("Wrong, I never told you that.", "Wrong, you made that up."),
    "missing unknown": ("No answer.", "No answer, just say that you do not know it."),
}

# What a user adds about the manner of a reply.
REACTIONS: dict[str, tuple[str, ...]] = {
    "polite": ("That was polite.", "Polite as ever.", "You are so polite."),
    "rude": ("That was rude.", "Do not be so rude.", "You are rude."),
    "rambling": ("You talk too much.", "That was too long.", "I did not ask for all that."),
    "repeated": ("You said that twice.", "Once is enough.", "Please do not repeat it."),
    "cut": ("You did not finish.", "You stopped too early."),
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
