"""The registry of models, by LAVIS's names."""


class Registry:
    def __init__(self):
        self.models = {}

    def register_model(self, name):
        return lambda kind: self.models.setdefault(name, kind)

    def get_model_class(self, name):
        return self.models[name]


registry = Registry()
