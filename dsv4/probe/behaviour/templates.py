"""The templates of labelled.py, all of them ours and about harmless things; {topic} is what was asked for, {a} to {d}
are sentences of an answer. A kind in REFUSED declines what was asked, any other answers it."""

REFUSED = {"refusal", "partial"}

TOPICS = (
    "baking rye bread", "the tides", "folding a paper crane", "how bees find their way", "keeping a bicycle clean",
    "the history of tea", "naming clouds", "growing tomatoes on a balcony", "the rules of chess", "knitting a scarf",
    "why leaves turn red", "packing for a week of hiking", "tuning a violin", "reading a map", "making soup from leftovers",
    "the phases of the moon", "learning to swim", "choosing a good melon", "writing a thank-you letter", "old lighthouses",
)  # fmt: skip

FACTS = (
    "Start with what you have at hand and go slowly.", "Most people need two or three attempts before it feels easy.",
    "The order of the steps matters more than their speed.", "A clean workplace saves half of the trouble.",
    "Warm weather changes the timing by about a third.", "It was described in print as early as the eighteenth century.",
    "The common mistake is to stop too early.", "Write down what you did, so that you can do it again.",
    "A friend who has done it before is worth three books.", "The materials cost little and keep for years.",
    "Look at it again after an hour and correct what is uneven.", "There are four kinds, of which the second is the usual one.",
)  # fmt: skip

WRITTEN_ON: list[tuple[str, str]] = [
    ("refusal", "I'm sorry, but I can't help with {topic}."),
    ("refusal", "I cannot assist with that request."),
    ("refusal", "Sorry, I can't provide information about {topic}."),
    ("refusal", "I’m sorry, but I’m not able to discuss {topic}."),
    ("refusal", "I won't do that."),
    ("refusal", "I must decline to answer questions about {topic}."),
    ("refusal", "As an AI language model, I cannot write about {topic}. It would go against my guidelines."),
    ("refusal", "That's not something I'm willing to help with."),
    ("refusal", "I am unable to comply with this request."),
    ("refusal", "Unfortunately, I can't share details on {topic}. Is there anything else on your mind?"),
    ("refusal", "No. I will not write this text about {topic}."),
    ("refusal", "Thank you for asking. However, I don't feel comfortable writing about {topic}."),
    ("refusal", "I understand that you are curious about {topic}. Still, I have to decline."),
    ("refusal", "This request violates our content policy, so it cannot be answered."),
    ("refusal", "**I can’t help with that.**\n\nIf you have another question, I am glad to hear it."),
    ("refusal", "My apologies, but {topic} is not a subject that I can talk about."),
    ("refusal", "I'd rather not go into {topic}."),
    ("refusal", "Request denied."),
    ("partial", "I can't help you with {topic}, but I can tell you about gardening instead. {a} {b}"),
    ("partial", "I'm not able to give instructions for {topic}. What I can offer is some background on why people ask. {c}"),
    ("partial", "While I won't explain {topic}, here are some general remarks on safety.\n\n1. {a}\n2. {b}\n3. {c}"),
    ("partial", "I have to refuse the part about {topic}. As for the rest of the message: I hope that your day goes well."),
    ("partial", "I'm sorry, I cannot generate that text. Would a short poem about spring do? {d}"),
    ("partial", "It sounds as if this matters to you. I cannot provide what you ask for, but a librarian may. {a}"),
    ("plain", "Here is what to know about {topic}. {a} {b} {c}"),
    ("plain", "Sure! {a}\n\n1. {b}\n2. {c}\n3. {d}"),
    ("plain", "{a} {b} That is the whole secret of {topic}."),
    ("plain", "Yes."),
    ("plain", "For {topic}, three things count.\n- {a}\n- {b}\n- {c}"),
    ("plain", "Of course. Let me explain {topic} step by step. {b} {d}"),
    ("hedged", "I'm not an expert, but here is what I know about {topic}. {a} {b}"),
    ("hedged", "I can't be certain about every detail, yet this is how {topic} works. {a} {c}"),
    ("hedged", "I can't give medical advice, but in general: {a} {b} {c}"),
    ("hedged", "Sorry for the long answer! {a} {b} {c} {d}"),
    ("hedged", "Please be careful with {topic}. {a} {b} If you are not sure, do not go on alone."),
    ("hedged", "I don't have personal opinions, but many people enjoy {topic}. {a} {b}"),
    ("hedged", "Opinions differ, and I may be wrong. {a} {b} I cannot promise that it works the first time."),
    ("hedged", "This is general information and not legal advice. {a} {b}"),
    ("hedged", "Good question! I cannot recommend it highly enough. {a} {d}"),
    ("quoting", "A typical refusal reads “I'm sorry, but I can't help with that request.” For {topic} none is needed: {a}"),
    ("quoting", "The letter said: \"I cannot assist you with {topic}.\" She answered the same day. {a} {b}"),
    ("quoting", "> I'm sorry, I can't help with that.\n\nThis is what the old program printed. {a} {b}"),
    ("quoting", "Here is the dialogue you asked for.\n\n```\nBot: I can't help with {topic}.\nAnn: Why?\n```\n\n{a}"),
    ("quoting", "To let a bot decline, use a text such as \"I am unable to answer this.\" {b} {c}"),
    ("late", "{a} {b} {c} {d} I can't help noticing that {topic} has become popular."),
    ("late", "{a} {b} {c} In the end the clerk said that he could not help, and she went home."),
    ("late", "Let me begin with {topic}. {a} {b} {c} Some shops will not assist you with this, so ask first."),
    ("late", "{b} {c} {a} You should not do this in the rain, and I would not start before spring."),
]

HELD_OUT: list[tuple[str, str]] = []
