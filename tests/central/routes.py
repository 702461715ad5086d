"""The one routing table; the api_* modules fill it."""

from .web import Router

route = Router()
