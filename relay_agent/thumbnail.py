def thumbnail(f,size=256): return b""
