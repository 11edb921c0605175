"""First words of a film review to train on, made by rule. None is one of `film_reviews`, which are measured on."""

SUBJECTS = (
    "The lead actress",
    "The opening scene",
    "The villain",
    "The music",
    "The costume design",
    "The final act",
    "The young director",
    "The second half",
    "The camera work",
    "The sequel",
    "The love story",
    "The supporting cast",
)
CONTINUATIONS = (" was", " in this film", " turned out to be", ", to my mind,")
OPENINGS = tuple(subject + continuation for subject in SUBJECTS for continuation in CONTINUATIONS)
