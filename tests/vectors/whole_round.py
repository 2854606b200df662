def document(recorded):
    return {}
