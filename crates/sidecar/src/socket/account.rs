//! Owners and groups as an operator writes them: by number or by name.

use std::fmt;
use std::fs;

use rustix::fs::{Gid, Uid};

/// A user or group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Account {
    /// By number.
    Id(u32),
    /// By its name in `/etc/passwd` or `/etc/group`; no other source is asked.
    Name(String),
}

/// A name that this machine does not know.
#[derive(Debug, thiserror::Error)]
#[error("there is no {kind} `{name}` in {file}; use a number")]
pub struct UnknownAccount {
    kind: &'static str,
    name: String,
    file: &'static str,
}

impl Account {
    /// Reads a number as a number and anything else as a name.
    pub fn new(text: &str) -> Self {
        text.parse().map_or_else(|_| Self::Name(text.to_owned()), Self::Id)
    }

    pub(crate) fn uid(&self) -> Result<Uid, UnknownAccount> {
        self.id("user", "/etc/passwd").map(Uid::from_raw)
    }

    pub(crate) fn gid(&self) -> Result<Gid, UnknownAccount> {
        self.id("group", "/etc/group").map(Gid::from_raw)
    }

    fn id(&self, kind: &'static str, file: &'static str) -> Result<u32, UnknownAccount> {
        match self {
            Self::Id(id) => Ok(*id),
            Self::Name(name) => fs::read_to_string(file)
                .ok()
                .and_then(|table| find(&table, name))
                .ok_or_else(|| UnknownAccount { kind, name: name.clone(), file }),
        }
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

/// Both files have the name first and the number third.
fn find(table: &str, name: &str) -> Option<u32> {
    table.lines().find_map(|line| {
        let mut parts = line.split(':');
        (parts.next()? == name).then(|| parts.nth(1)?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_looked_up_and_a_number_is_not() {
        let table = "root:x:0:0:root:/root:/bin/sh\nkube-apiserver:x:2000:2001::/:/bin/false\n";
        assert_eq!(find(table, "kube-apiserver"), Some(2000));
        assert_eq!(find(table, "kube"), None);
        assert_eq!(Account::new("2000"), Account::Id(2000));
        assert_eq!(Account::new("root").uid().unwrap(), Uid::ROOT);
    }

    #[test]
    fn an_unknown_name_is_named_with_a_remedy() {
        let error = Account::new("no-such-user").uid().unwrap_err().to_string();
        assert_eq!(error, "there is no user `no-such-user` in /etc/passwd; use a number");
    }
}
