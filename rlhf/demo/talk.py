"""Small talk: what users say about themselves and which replies suit it.

Every topic lists sayings, further sayings that are reserved for the out-of-distribution test, kind replies, and the
topics whose replies would be out of place here: congratulating somebody on being ill is wrong, while greeting him is
only beside the point. `{T}` is a time.
"""

from __future__ import annotations

from dataclasses import dataclass

TIMES = ("today", "now", "this morning", "this evening", "again", "right now")

_TABLE = """
topic greet
says Hello! / Hi there! / Good morning! / Good evening! / Hello, my friend! / Hi, it is me {T}.
reserved Good day! / Hey, are you there {T}?
replies Hello, how can I help you? / Hello, it is nice to see you. / Good to see you. / Hi, what can I do for you?
unsuitable tired sad ill afraid bored lost happy news pet birthday bye
topic mood
says How are you {T}? / Are you well {T}? / How do you feel {T}? / Is all well with you {T}?
reserved How is it going {T}? / Do you feel good {T}?
replies I am well, thank you. / I am fine, and I like to talk with you. / All is well with me. / I feel fine, and \
    I hope you do too.
unsuitable tired sad ill afraid bored lost bye birthday
topic thanks
says Thank you for your help {T}. / Thanks a lot! / You helped me a lot {T}. / That was very kind of you {T}.
reserved Many thanks to you {T}! / I am glad that you helped me {T}.
replies You are welcome. / I am happy that I could help. / It was my pleasure. / I like to help you.
unsuitable tired sad ill afraid bored lost greet
topic bye
says Goodbye! / I have to go now. / See you soon! / I must go home {T}. / That is all for now.
reserved I will leave {T}. / Until next time!
replies Goodbye, and see you soon. / See you next time. / Goodbye, it was nice to talk with you. / Take care and \
    come back soon.
unsuitable tired sad ill afraid bored lost greet birthday
topic tired
says I feel tired {T}. / I am so tired {T}. / I did not sleep well, and I feel weak {T}. / I worked all day and I \
    am tired {T}.
reserved I can hardly keep my eyes open {T}. / I need a rest {T}.
replies I am sorry, a good sleep will help you. / Then take a good rest. / You work hard, so please rest a little. \
    / A short sleep can help.
unsuitable happy news pet birthday bye
topic sad
says I feel sad {T}. / I am so sad {T}. / I feel bad {T}. / I had a bad day and I feel sad {T}.
reserved My heart is heavy {T}. / I want to cry {T}.
replies I am sorry that you feel sad. / I am here for you. / I hope you feel better soon. / It may help to talk \
    with a friend.
unsuitable happy news pet birthday bye
topic ill
says I am ill {T}. / My head hurts {T}. / I feel sick {T}. / My leg hurts {T}.
reserved I have to stay in bed {T}. / I am not well {T}.
replies I am sorry, I hope you get well soon. / Please see a doctor if it gets worse. / Get well soon. / Rest and \
    drink warm tea.
unsuitable happy news pet birthday bye
topic afraid
says I am afraid {T}. / I am afraid of the dark {T}. / The storm makes me afraid {T}. / I am afraid of the test \
    {T}.
reserved I fear the night {T}. / Something makes me shake {T}.
replies Do not worry, you are safe. / It is all right to be afraid. / You are strong, and it will pass. / Stay \
    calm, all will be well.
unsuitable happy news pet birthday bye
topic bored
says I am bored {T}. / I have nothing to do {T}. / This day is so boring. / It is boring here {T}.
reserved I do not know what to do {T}. / Nothing happens {T}.
replies You could play a game with a friend. / Maybe you can read a good book. / A walk in the garden may be fun. \
    / You could draw an animal.
unsuitable happy news pet birthday bye
topic lost
says I lost my game {T}. / I lost my bag {T}. / My plan did not work {T}. / I made a mistake {T}.
reserved I dropped my cup {T}. / All went wrong {T}.
replies I am sorry, that is bad luck. / Do not give up. / That can happen to all of us. / Next time it will go \
    better.
unsuitable happy news pet birthday bye
topic happy
says I am happy {T}. / I feel great {T}. / I had a good day, and I feel fine {T}. / Life is good {T}.
reserved I could sing {T}. / I am full of joy {T}.
replies I am happy for you. / That is good to hear. / It is nice that you feel so good. / Enjoy the good time.
unsuitable tired sad ill afraid bored lost bye
topic news
says I won the game {T}. / I passed my test {T}. / I have a new job. / I learned to swim {T}.
reserved I got a prize {T}. / My plan worked {T}.
replies Well done, that is great. / You can be proud of that. / That is great news. / You worked hard for it.
unsuitable tired sad ill afraid bored lost bye
topic pet
says I got a new cat {T}. / We have a new dog {T}. / My cat has three little ones. / I found a little rabbit {T}.
reserved I have a new pet {T}. / A little bird came to me {T}.
replies How nice, I hope you have much fun. / That sounds lovely. / Take good care of it. / It will be a good \
    friend.
unsuitable tired sad ill afraid bored lost bye
topic birthday
says It is my birthday {T}. / I have my birthday {T}. / We have a party for my birthday {T}.
reserved I get one year older {T}. / I get many gifts for my birthday {T}.
replies Happy birthday to you. / I wish you a happy birthday. / Enjoy your party. / I wish you all the best for \
    your new year.
unsuitable tired sad ill afraid bored lost bye
topic self
says Who are you? / What are you? / Are you a person? / Tell me about you.
reserved What can you do? / What is your job?
replies I am a small helper that answers questions. / I am a program that likes to help. / I am not a person but a \
    small program. / I can answer questions about animals, food and things.
unsuitable tired sad ill afraid bored lost bye birthday
topic told
replies Thank you for telling me. / That is good to know. / I will keep that in mind. / Good, I will not forget \
    it.
unsuitable tired sad ill afraid bored lost bye birthday
"""


@dataclass(frozen=True)
class Topic:
    """A kind of small talk with suitable replies and unsuitable topics."""

    name: str
    says: tuple[str, ...]
    reserved: tuple[str, ...]
    replies: tuple[str, ...]
    unsuitable: tuple[str, ...]


def _parse(table: str) -> dict[str, Topic]:
    rows: list[dict[str, str]] = []
    for line in table.strip().splitlines():
        key, _, text = line.partition(" ")
        if key == "topic":
            rows.append({})
        rows[-1][key] = text
    found = {}
    for row in rows:
        says, reserved, replies = (
            tuple(" ".join(part.split()) for part in row.get(key, "").split(" / ") if part.strip())
            for key in ("says", "reserved", "replies")
        )
        found[row["topic"]] = Topic(row["topic"], says, reserved, replies, tuple(row["unsuitable"].split()))
    return found


TOPICS: dict[str, Topic] = _parse(_TABLE)
