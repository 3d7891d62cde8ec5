class Tuning:
    def __init__(self, *a): pass
    def ensure(self, net, large): pass
