"""Other projects that do best-of-N, each in an environment of its own that is made when it is first measured."""
