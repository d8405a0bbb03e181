//! What the report says of the walls round the process.

use std::fmt;

use serde::Serialize;

/// Which walls stand round the process. `docs/security.md` says what they are worth.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Walls {
    /// What becomes of a call that a thread's filter has not: the word of `--seccomp`.
    pub seccomp: &'static str,
    /// The level of Landlock at which the process is bounded to its VM's files; absent (`null`) where it is not.
    pub landlock: Option<i32>,
    /// Why it is not, where it was to be if the kernel has it.
    pub lacking: Option<String>,
    /// The process is in a jail: `--jail`.
    pub jail: bool,
    /// Whose rights it has, where that is not who started it: `--user`.
    pub user: Option<String>,
}

impl Walls {
    /// The word of `--seccomp`, the level of Landlock, and why that is not there though it was to be.
    #[must_use]
    pub fn new(seccomp: &'static str, landlock: Option<i32>, lacking: Option<&str>) -> Self {
        Self {
            seccomp,
            landlock,
            lacking: lacking.map(str::to_owned),
            jail: false,
            user: None,
        }
    }

    /// Whether the process is in a jail, and as which other user.
    #[must_use]
    pub fn apart(self, jail: bool, user: Option<String>) -> Self {
        Self { jail, user, ..self }
    }
}

impl fmt::Display for Walls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>10} seccomp", self.seccomp)?;
        match (self.landlock, &self.lacking) {
            (Some(level), _) => write!(f, ", Landlock at level {level}"),
            (None, Some(why)) => write!(f, ", no Landlock ({why})"),
            (None, None) => write!(f, ", no Landlock"),
        }?;
        if self.jail {
            write!(f, ", in a jail")?;
        }
        match &self.user {
            Some(user) => write!(f, ", as user {user}"),
            None => Ok(()),
        }
    }
}
