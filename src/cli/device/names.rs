//! What devices are called, by the PCI ID database (<https://pci-ids.ucw.cz>).
//!
//! The crate `pci-ids` has the database, of which `build.rs` makes a text of 0.8 MB in this program: a text that nobody
//! looks at costs a VM nothing. What that does not know, the host's own database may, which is newer on a new host.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::Path;

/// The names that are always there.
static EMBEDDED: &str = include_str!(concat!(env!("OUT_DIR"), "/pci.ids"));

/// Where distributions keep theirs.
const PLACES: [&str; 2] = ["/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids"];

/// What devices are called: by the first database that knows.
#[derive(Debug)]
pub(super) struct Names(Vec<Database>);

impl Names {
    /// The database in this program, and the host's own where it has one.
    pub(super) fn load() -> Self {
        Self::of(PLACES.map(Path::new))
    }

    fn of<'a>(places: impl IntoIterator<Item = &'a Path>) -> Self {
        let host = places.into_iter().find_map(|place| fs::read(place).ok());
        let host = host.map(|bytes| Cow::Owned(String::from_utf8_lossy(&bytes).into_owned()));
        let texts = [Cow::Borrowed(EMBEDDED)].into_iter().chain(host);
        Self(texts.map(Database::index).collect())
    }

    /// Vendor and device in words; their numbers where no database has them.
    pub(super) fn device(&self, vendor: u16, device: u16) -> String {
        let mut sections = self.0.iter().filter_map(|database| database.vendor(vendor));
        let id = format!("{device:04x}");
        let named = |section| Some((section, Some(entry(section, &id)?)));
        let known = sections.clone().find_map(named);
        match known.or_else(|| Some((sections.next()?, None))) {
            Some((section, name)) => {
                let vendor = head(section).map_or("", short_vendor);
                name.map_or_else(
                    || format!("{vendor} device {id}"),
                    |name| format!("{vendor} {name}"),
                )
            }
            None => format!("{vendor:04x}:{id}"),
        }
    }

    /// What kind of device a class code is: `Ethernet` for 0x020000.
    pub(super) fn class(&self, class: u32) -> String {
        let [_, base, sub, interface] = class.to_be_bytes();
        // NVMe is what everybody calls it; the database has it as one interface of its subclass.
        if (base, sub, interface) == (0x01, 0x08, 0x02) {
            return "NVMe".to_owned();
        }
        let sections = self.0.iter().filter_map(|database| database.class(base));
        let id = format!("{sub:02x}");
        let name = sections.clone().find_map(|section| entry(section, &id));
        match name.or_else(|| sections.clone().find_map(head)) {
            Some(name) => name.strip_suffix(" controller").unwrap_or(name).to_owned(),
            None => format!("class {base:02x}{sub:02x}"),
        }
    }
}

/// A database, with an index of its sections.
#[derive(Debug)]
struct Database {
    text: Cow<'static, str>,
    vendors: HashMap<u16, Range<usize>>,
    classes: HashMap<u8, Range<usize>>,
}

impl Database {
    /// Finds where each vendor's and each class's section is.
    fn index(text: Cow<'static, str>) -> Self {
        let mut vendors = HashMap::new();
        let mut classes = HashMap::new();
        let mut sections = Vec::new();
        let mut start = 0;
        for line in text.split_inclusive('\n') {
            if !line.starts_with(['\t', '#', '\n']) {
                sections.push(start);
            }
            start += line.len();
        }
        sections.push(text.len());
        for section in sections.windows(2) {
            let range = section[0]..section[1];
            let head = text.get(range.clone()).unwrap_or_default();
            let id = head.split_once("  ").map_or("", |(id, _)| id);
            if let Some(class) = id.strip_prefix("C ") {
                if let Ok(class) = u8::from_str_radix(class, 16) {
                    classes.insert(class, range);
                }
            } else if let Ok(vendor) = u16::from_str_radix(id, 16) {
                vendors.insert(vendor, range);
            }
        }
        Self {
            text,
            vendors,
            classes,
        }
    }

    fn vendor(&self, id: u16) -> Option<&str> {
        self.text.get(self.vendors.get(&id)?.clone())
    }

    fn class(&self, id: u8) -> Option<&str> {
        self.text.get(self.classes.get(&id)?.clone())
    }
}

/// The name in a section's first line: `8086  Intel Corporation`.
fn head(section: &str) -> Option<&str> {
    Some(section.lines().next()?.split_once("  ")?.1)
}

/// The name of an entry of a section: a line of a tab, its id, and its name.
fn entry<'a>(section: &'a str, id: &str) -> Option<&'a str> {
    section.lines().find_map(|line| {
        let line = line.strip_prefix('\t')?;
        line.strip_prefix(id)?.strip_prefix("  ")
    })
}

/// A vendor's name without what only its lawyers call it.
fn short_vendor(name: &str) -> &str {
    // `Advanced Micro Devices, Inc. [AMD]`; with `[AMD/ATI]` too.
    if let Some((_, short)) = name
        .strip_suffix(']')
        .and_then(|name| name.rsplit_once('['))
    {
        return short;
    }
    let mut name = name;
    while let Some((rest, last)) = name.rsplit_once(' ') {
        let last = last.trim_end_matches(['.', ',']);
        let legal = [
            "Corporation",
            "Corp",
            "Incorporated",
            "Inc",
            "Co",
            "Company",
            "Ltd",
            "Limited",
            "LLC",
            "GmbH",
            "AG",
            "B.V",
            "S.A",
        ];
        if !legal.contains(&last) {
            break;
        }
        name = rest.trim_end_matches(',');
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names that the program brings, and no host's.
    fn own() -> Names {
        Names::of([])
    }

    #[test]
    fn the_embedded_database_names_devices_and_classes() {
        let names = own();
        assert_eq!(
            names.device(0x8086, 0x10d3),
            "Intel 82574L Gigabit Network Connection"
        );
        assert_eq!(
            names.device(0x1022, 0x1480),
            "AMD Starship/Matisse Root Complex"
        );
        assert_eq!(names.device(0x8086, 0xfffe), "Intel device fffe");
        assert_eq!(names.device(0xfff0, 0x0001), "fff0:0001");
        assert_eq!(names.class(0x020000), "Ethernet");
        assert_eq!(names.class(0x010802), "NVMe");
        assert_eq!(names.class(0x060400), "PCI bridge");
        assert_eq!(names.class(0x02fe00), "Network");
        assert_eq!(names.class(0xee0100), "class ee01");
    }

    #[test]
    fn what_the_program_does_not_know_the_hosts_database_may() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("pci.ids");
        let text = "# comment\n8086  Intel\n\t10d3  Some NIC\n\tfffe  New NIC\nfff0  New\nC 02  Wires\n\t00  Wire\n\tfe  Wireless\n";
        fs::write(&place, text).unwrap();
        let names = Names::of([Path::new("/nonexistent"), &place]);
        assert_eq!(names.device(0x8086, 0x10d3), own().device(0x8086, 0x10d3));
        assert_eq!(names.device(0x8086, 0xfffe), "Intel New NIC");
        assert_eq!(names.device(0x8086, 0xfffd), "Intel device fffd");
        assert_eq!(names.device(0xfff0, 1), "New device 0001");
        assert_eq!(names.class(0x020000), "Ethernet");
        assert_eq!(names.class(0x02fe00), "Wireless");
        assert_eq!(names.class(0x060400), "PCI bridge");
    }

    #[test]
    fn a_broken_database_does_no_harm() {
        for text in [
            "",
            "\n",
            "\t\t\t",
            "8086",
            "8086  ",
            "C \n\t",
            "zzzz  é\n\t10d3",
            "8086  X\n\t",
        ] {
            let names = Names(vec![Database::index(Cow::Borrowed(text))]);
            names.device(0x8086, 0x10d3);
            names.class(0x020000);
        }
    }
}
