"""A small vision-language model that answers questions about generated pictures; README.md says how it is trained."""
