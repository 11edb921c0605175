"""The training prompts: 48 generated openings of film reviews, none of which is among the held-out `film_reviews`."""

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
