//! What was found when a host or a device was looked over, and what to do about it.

use std::fmt;

use busway_iommu::Command;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// As it should be.
    Fine,
    /// Worth knowing.
    Note,
    /// It works, but not well or not safely.
    Warning,
    /// It does not work.
    Obstacle,
}

impl Level {
    /// The level in one word, which does not change.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Fine => "fine",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Obstacle => "obstacle",
        }
    }
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remedy {
    /// In words.
    pub what: String,
    /// The command that does it, where one does.
    pub command: Option<Command>,
}

impl Remedy {
    /// Something that no command does.
    pub fn words(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            command: None,
        }
    }

    /// Something that a command does. Where a name in it cannot be written on a line, the words alone
    /// stay.
    pub fn command(what: impl Into<String>, command: Command) -> Self {
        Self {
            what: what.into(),
            command: Some(command).filter(Command::can_be_written),
        }
    }
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.command {
            Some(command) => write!(f, "{}: {command}", self.what),
            None => f.write_str(&self.what),
        }
    }
}

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How much it matters.
    pub level: Level,
    /// What it is about, in a word that does not change: `iommu`, `reset`.
    pub topic: &'static str,
    /// What was found.
    pub text: String,
    /// What to do about it: each line by itself helps.
    pub remedies: Vec<Remedy>,
}

impl Finding {
    /// Something found.
    pub fn new(level: Level, topic: &'static str, text: impl Into<String>) -> Self {
        Self {
            level,
            topic,
            text: text.into(),
            remedies: Vec::new(),
        }
    }

    /// The same with a way to mend it.
    #[must_use]
    pub fn remedy(mut self, remedy: Remedy) -> Self {
        self.remedies.push(remedy);
        self
    }

    /// The same with ways to mend it.
    #[must_use]
    pub fn remedies(mut self, remedies: impl IntoIterator<Item = Remedy>) -> Self {
        self.remedies.extend(remedies);
        self
    }
}

/// The worst of all levels; fine where there is nothing.
pub fn worst<'a>(findings: impl IntoIterator<Item = &'a Finding>) -> Level {
    let levels = findings.into_iter().map(|finding| finding.level);
    levels.max().unwrap_or(Level::Fine)
}
