WORD="ps3.15"
class S:
    name="stub"; language="stub"
    def apply(self,file,context):
        context.rule="ps3.15 stub"
        d=file.dataset
        for t in (0x00100010,0x00100020,0x00104000):
            if t in d: d.put_text(t,"")
        for t in (0x0020000d,0x0020000e,0x00080018):
            d.put_text(t,context.uids.new(d.text(t)))
def parse(text,name): return S()
