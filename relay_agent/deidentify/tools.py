def difference(a,b): return []
