"""Stands in for the package of that name: one id a character."""


class SentencePieceProcessor:
    def __init__(self, model_file):
        self.model_file = model_file

    def encode(self, text):
        return [3 + ord(character) % 37 for character in text]
