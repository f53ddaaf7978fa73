"""How attention of an unchanged model reads pages: the registered function, handles, custom ops."""
