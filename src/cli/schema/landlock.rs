//! The words of `--landlock-rules`.

use std::path::PathBuf;

use super::{Key, Reason, Section, Value};
use crate::config::{LandlockAccess, LandlockRule};

/// What an access can be.
const ACCESSES: &[&str] = &["r", "w", "rw"];

/// `--landlock-rules`
pub(in crate::cli) static LANDLOCK_RULES: Section<LandlockRule> = Section {
    name: "landlock-rules",
    summary: "What may be opened besides, with --landlock: path=PATH,access=r|w|rw",
    words: &[],
    notes: "",
    blank: || LandlockRule {
        path: PathBuf::new(),
        access: LandlockAccess::ReadWrite,
    },
    keys: keys! {
        "path" { "PATH": "a file, or a folder with all that is below it" }
            |rule, value| rule.path = value.text()?.into();
        "access" { "r": "files are read, and folders listed", "w": "files are written, made and removed", "rw": "both [rw]" }
            |rule, value| rule.access = access(value)?;
    },
    required: &["path"],
    bare: None,
    single: false,
    details: &[],
};

fn access(value: &Value) -> Result<LandlockAccess, Reason> {
    let word = value.text()?;
    LandlockAccess::of_word(word).ok_or_else(|| Reason::Word {
        value: word.to_owned(),
        words: ACCESSES,
    })
}
