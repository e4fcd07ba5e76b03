"""Which target pieces a sentence may become: the file of candidates, and how it is learnt."""
