//! Who a container runs as.
//!
//! ```text
//! CRI + image USER --user_request--> UserRequest --RootfsFacts::scan--> RootfsFacts
//!                                         \------------resolve----------/--> ResolvedUser
//! ```
//!
//! The files come from an image, so they may be endless: lines and sizes are
//! bounded, and only what was asked for is kept (CVE-2026-47262, CVE-2025-4437).

use crate::facts::ImageDefaults;
use proto::cri;
use std::collections::BTreeSet;
use std::io::BufRead;
use types::{Error, Result, ResultExt};

/// The highest uid and gid: OCI runtimes keep them in signed 32-bit numbers
/// (CVE-2024-40635, CVE-2026-46680).
const LARGEST_ID: u32 = i32::MAX as u32;
/// The largest /etc/passwd or /etc/group that is read, in bytes.
pub const LARGEST_FILE: u64 = 16 << 20;
/// Longer lines are no entries, in bytes.
const LONGEST_LINE: usize = 1 << 20;
/// The kernel's NGROUPS_MAX.
const MOST_GROUPS: usize = 65_536;

/// A user or a group as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdOrName {
    /// A number.
    Id(u32),
    /// A name that the image's files must know.
    Name(String),
}

/// What CRI and the image ask for, before the image's files were read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserRequest {
    /// The user; root where nobody says anything.
    pub user: IdOrName,
    /// The primary group, where it was named.
    pub group: Option<IdOrName>,
    /// `supplemental_groups`.
    pub supplemental: Vec<u32>,
    /// Whether the image's groups of the user are added (policy Merge).
    pub merge: bool,
}

/// One entry of /etc/passwd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PasswdEntry {
    /// The user's name.
    pub name: String,
    /// The uid.
    pub uid: u32,
    /// The primary gid.
    pub gid: u32,
}

/// What the image's files say of one [`UserRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RootfsFacts {
    /// The user's entry in /etc/passwd.
    pub passwd: Option<PasswdEntry>,
    /// The gid of the requested group's name in /etc/group.
    pub group: Option<u32>,
    /// The groups in /etc/group that list the user.
    pub member_of: Vec<u32>,
}

/// The credentials of the container's processes, as ContainerStatus shows them.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct ResolvedUser {
    /// The uid.
    pub uid: u32,
    /// The primary gid.
    pub gid: u32,
    /// All groups, the primary one included, ascending.
    pub groups: Vec<u32>,
}

/// Reads the user out of CRI's security context and the image's USER.
///
/// `run_as_username` wins over `run_as_user`, both over the image; a number is
/// always a uid.
///
/// # Errors
/// `InvalidArgument`: an id outside 0 to 2^31-1, a group without a user, a name
/// that can't be one.
pub fn user_request(sc: &cri::LinuxContainerSecurityContext, image: &ImageDefaults) -> Result<UserRequest> {
    let given = if !sc.run_as_username.is_empty() {
        Some(id_or_name("run_as_username", &sc.run_as_username)?)
    } else if let Some(uid) = &sc.run_as_user {
        Some(IdOrName::Id(id("run_as_user", uid.value)?))
    } else {
        None
    };
    let given_group = match &sc.run_as_group {
        Some(gid) => Some(IdOrName::Id(id("run_as_group", gid.value)?)),
        None => None,
    };
    let (user, group) = match (given, given_group) {
        (Some(user), group) => (user, group),
        (None, Some(_)) => {
            return Err(Error::invalid("run_as_group is set without run_as_user or run_as_username"));
        }
        (None, None) => image_user(&image.user)?,
    };
    let supplemental =
        sc.supplemental_groups.iter().map(|g| id("supplemental_groups", *g)).collect::<Result<Vec<_>>>()?;
    if supplemental.len() > MOST_GROUPS {
        return Err(Error::invalid(format!("supplemental_groups has more than {MOST_GROUPS} entries")));
    }
    let merge = match cri::SupplementalGroupsPolicy::try_from(sc.supplemental_groups_policy) {
        Ok(cri::SupplementalGroupsPolicy::Merge) => true,
        Ok(cri::SupplementalGroupsPolicy::Strict) => false,
        Err(_) => {
            let value = sc.supplemental_groups_policy;
            return Err(Error::invalid(format!("supplemental_groups_policy {value} is unknown")));
        }
    };
    Ok(UserRequest { user, group, supplemental, merge })
}

/// The image's USER: `user`, `uid`, `user:group` in every mixture.
fn image_user(text: &str) -> Result<(IdOrName, Option<IdOrName>)> {
    let field = "the image's USER";
    match text.split_once(':') {
        None if text.is_empty() => Ok((IdOrName::Id(0), None)),
        None => Ok((id_or_name(field, text)?, None)),
        Some((user, group)) => {
            let user = if user.is_empty() { IdOrName::Id(0) } else { id_or_name(field, user)? };
            let group = if group.is_empty() { None } else { Some(id_or_name(field, group)?) };
            Ok((user, group))
        }
    }
}

fn id(field: &str, value: i64) -> Result<u32> {
    u32::try_from(value)
        .ok()
        .filter(|v| *v <= LARGEST_ID)
        .ok_or_else(|| Error::invalid(format!("{field} {value} is outside 0 to {LARGEST_ID}")))
}

fn id_or_name(field: &str, text: &str) -> Result<IdOrName> {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) {
        // A number that fits no i64 is as far out of range as one that fits no u32.
        return match text.parse::<i64>() {
            Ok(value) => id(field, value).map(IdOrName::Id),
            Err(_) => Err(Error::invalid(format!("{field} {text:?} is outside 0 to {LARGEST_ID}"))),
        };
    }
    if text.is_empty() || text.contains([':', '\n', '\0', ',']) {
        return Err(Error::invalid(format!("{field} {text:?} is no user or group name")));
    }
    Ok(IdOrName::Name(text.to_string()))
}

impl RootfsFacts {
    /// Scans the image's /etc/passwd and /etc/group (`None`: the image has none)
    /// for what `request` needs.
    ///
    /// # Errors
    /// A file above [`LARGEST_FILE`], an id of the requested user or group that is
    /// out of range, or a failed read.
    pub fn scan(
        request: &UserRequest,
        passwd: Option<impl BufRead>,
        group: Option<impl BufRead>,
    ) -> Result<RootfsFacts> {
        let mut facts = RootfsFacts::default();
        if let Some(file) = passwd {
            facts.passwd = scan_passwd(&request.user, file)?;
        }
        if let Some(file) = group {
            let name = match (&request.user, &facts.passwd) {
                (IdOrName::Name(name), _) => Some(name.clone()),
                (IdOrName::Id(_), Some(entry)) => Some(entry.name.clone()),
                (IdOrName::Id(_), None) => None,
            };
            scan_group(&mut facts, request, name.as_deref(), file)?;
        }
        Ok(facts)
    }
}

fn scan_passwd(user: &IdOrName, file: impl BufRead) -> Result<Option<PasswdEntry>> {
    let mut found = None;
    each_line("/etc/passwd", file, |line| {
        let mut fields = line.split(':');
        let (Some(name), _, Some(uid), Some(gid)) = (fields.next(), fields.next(), fields.next(), fields.next()) else {
            return Ok(true);
        };
        let this_one = match user {
            IdOrName::Name(wanted) => wanted == name,
            IdOrName::Id(wanted) => uid.parse::<u32>().is_ok_and(|u| u == *wanted),
        };
        if !this_one || name.is_empty() {
            return Ok(true);
        }
        found = Some(PasswdEntry {
            name: name.to_string(),
            uid: file_id("/etc/passwd", name, "uid", uid)?,
            gid: file_id("/etc/passwd", name, "gid", gid)?,
        });
        Ok(false)
    })?;
    Ok(found)
}

fn scan_group(facts: &mut RootfsFacts, request: &UserRequest, user: Option<&str>, file: impl BufRead) -> Result<()> {
    let mut member_of = BTreeSet::new();
    each_line("/etc/group", file, |line| {
        let mut fields = line.split(':');
        let (Some(name), _, Some(gid)) = (fields.next(), fields.next(), fields.next()) else { return Ok(true) };
        let members = fields.next().unwrap_or("");
        if facts.group.is_none() && matches!(&request.group, Some(IdOrName::Name(wanted)) if wanted == name) {
            facts.group = Some(file_id("/etc/group", name, "gid", gid)?);
        }
        if request.merge
            && let Some(user) = user
            && members.split(',').any(|m| m.trim() == user)
            && member_of.len() < MOST_GROUPS
        {
            member_of.insert(file_id("/etc/group", name, "gid", gid)?);
        }
        Ok(true)
    })?;
    facts.member_of = member_of.into_iter().collect();
    Ok(())
}

fn file_id(file: &str, name: &str, what: &str, text: &str) -> Result<u32> {
    text.parse::<u32>().ok().filter(|v| *v <= LARGEST_ID).ok_or_else(|| {
        Error::invalid(format!("the image's {file} gives {name:?} the {what} {text:?}, outside 0 to {LARGEST_ID}"))
    })
}

/// Hands each line to `take` until it says false. Comments, lines that are no
/// UTF-8 and lines above the bound are passed over.
fn each_line(name: &str, mut file: impl BufRead, mut take: impl FnMut(&str) -> Result<bool>) -> Result<()> {
    let mut line = Vec::new();
    let mut overlong = false;
    let mut total = 0u64;
    loop {
        let chunk = file.fill_buf().context(|| format!("read the image's {name}"))?;
        if chunk.is_empty() {
            break;
        }
        let end = chunk.iter().position(|b| *b == b'\n');
        let used = end.map_or(chunk.len(), |n| n + 1);
        let text = &chunk[..end.unwrap_or(chunk.len())];
        if line.len() + text.len() > LONGEST_LINE {
            overlong = true;
            line.clear();
        } else if !overlong {
            line.extend_from_slice(text);
        }
        file.consume(used);
        total += used as u64;
        if total > LARGEST_FILE {
            return Err(Error::invalid(format!("the image's {name} is larger than {} MiB", LARGEST_FILE >> 20)));
        }
        if end.is_some() {
            if !overlong && !offer(&line, &mut take)? {
                return Ok(());
            }
            line.clear();
            overlong = false;
        }
    }
    if !overlong {
        offer(&line, &mut take)?;
    }
    Ok(())
}

fn offer(line: &[u8], take: &mut impl FnMut(&str) -> Result<bool>) -> Result<bool> {
    match std::str::from_utf8(line) {
        Ok(text) if !text.is_empty() && !text.starts_with('#') => take(text.trim_end_matches('\r')),
        _ => Ok(true),
    }
}

/// Joins request and facts. The primary group is always among the groups, or a
/// file's negative group permissions could be got round (CVE-2022-2995); beyond
/// it there are exactly those asked for, and with Merge the image's own
/// (CVE-2023-25173).
///
/// # Errors
/// `InvalidArgument` that names an unknown user or group.
pub fn resolve(request: &UserRequest, facts: &RootfsFacts) -> Result<ResolvedUser> {
    let (uid, own_gid) = match (&request.user, &facts.passwd) {
        (IdOrName::Id(uid), entry) => (*uid, entry.as_ref().map_or(0, |e| e.gid)),
        (IdOrName::Name(_), Some(entry)) => (entry.uid, entry.gid),
        (IdOrName::Name(name), None) => {
            return Err(Error::invalid(format!("user {name:?} is not in the image's /etc/passwd"))
                .hint("use a numeric uid or another image"));
        }
    };
    let gid = match (&request.group, facts.group) {
        (None, _) => own_gid,
        (Some(IdOrName::Id(gid)), _) => *gid,
        (Some(IdOrName::Name(_)), Some(gid)) => gid,
        (Some(IdOrName::Name(name)), None) => {
            return Err(Error::invalid(format!("group {name:?} is not in the image's /etc/group"))
                .hint("use a numeric gid or another image"));
        }
    };
    let mut groups: BTreeSet<u32> = request.supplemental.iter().copied().collect();
    groups.insert(gid);
    if request.merge {
        groups.extend(&facts.member_of);
    }
    Ok(ResolvedUser { uid, gid, groups: groups.into_iter().collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "# comment\nroot:x:0:0:root:/root:/bin/sh\nalice:x:1000:1001::/home/alice:/bin/sh\nbad:x:99999999999:0::/:/bin/sh\n\nnobody:x:65534:65534:n:/:/bin/false";
    const GROUP: &str =
        "root:x:0:\nwheel:x:10:root,alice\nalice:x:1001:\nvideo:x:44:bob, alice\nbroken\nhuge:x:4294967296:carol\n";

    fn request(username: &str, image: &str) -> UserRequest {
        let sc = cri::LinuxContainerSecurityContext { run_as_username: username.into(), ..Default::default() };
        user_request(&sc, &ImageDefaults { user: image.into(), ..Default::default() }).unwrap()
    }

    fn run(request: &UserRequest) -> Result<ResolvedUser> {
        resolve(request, &RootfsFacts::scan(request, Some(PASSWD.as_bytes()), Some(GROUP.as_bytes()))?)
    }

    #[test]
    fn every_form_of_user_is_read() {
        let user = |uid, gid, groups: &[u32]| ResolvedUser { uid, gid, groups: groups.to_vec() };
        for (image, expected) in [
            ("", user(0, 0, &[0, 10])),
            ("alice", user(1000, 1001, &[10, 44, 1001])),
            ("1000", user(1000, 1001, &[10, 44, 1001])),
            ("1000:5", user(1000, 5, &[5, 10, 44])),
            ("alice:wheel", user(1000, 10, &[10, 44])),
            (":wheel", user(0, 10, &[10])),
            ("4242", user(4242, 0, &[0])),
            ("4242:4243", user(4242, 4243, &[4243])),
        ] {
            assert_eq!(run(&request("", image)).unwrap(), expected, "{image:?}");
        }
        assert_eq!(run(&request("alice", "nobody")).unwrap().uid, 1000, "CRI wins");
    }

    #[test]
    fn unknown_names_are_named() {
        let e = run(&request("", "mallory")).unwrap_err();
        assert_eq!(e.kind(), types::ErrorKind::InvalidArgument);
        assert!(e.to_string().contains("\"mallory\""), "{e}");
        let e = run(&request("", "alice:nogroup")).unwrap_err();
        assert!(e.to_string().contains("\"nogroup\""), "{e}");
    }

    #[test]
    fn cve_2024_40635_cve_2026_46680_ids_beyond_the_range_are_refused() {
        let image =
            |user: &str| user_request(&Default::default(), &ImageDefaults { user: user.into(), ..Default::default() });
        for bad in ["2147483648", "4294967296", "4294967295", "-1", "0:4294967296", "99999999999999999999", "1000:-5"] {
            let e = image(bad).unwrap_err();
            assert_eq!(e.kind(), types::ErrorKind::InvalidArgument, "{bad}");
        }
        assert!(image("2147483647:2147483647").is_ok());
        assert!(run(&request("", "bad")).is_err(), "a uid out of range in the image's own file");
        for value in [-1, 1 << 31, 1 << 32, i64::MAX, i64::MIN] {
            let value = Some(cri::Int64Value { value });
            let sc = cri::LinuxContainerSecurityContext { run_as_user: value, ..Default::default() };
            assert!(user_request(&sc, &Default::default()).is_err());
        }
    }

    #[test]
    fn a_group_alone_is_refused() {
        let sc = cri::LinuxContainerSecurityContext {
            run_as_group: Some(cri::Int64Value { value: 5 }),
            ..Default::default()
        };
        assert!(user_request(&sc, &Default::default()).unwrap_err().to_string().contains("run_as_group"));
    }

    #[test]
    fn cve_2023_25173_groups_are_exactly_those_asked_for() {
        let sc = |policy: cri::SupplementalGroupsPolicy| cri::LinuxContainerSecurityContext {
            run_as_user: Some(cri::Int64Value { value: 1000 }),
            supplemental_groups: vec![1234, 1234],
            supplemental_groups_policy: policy as i32,
            ..Default::default()
        };
        let strict = user_request(&sc(cri::SupplementalGroupsPolicy::Strict), &Default::default()).unwrap();
        assert_eq!(run(&strict).unwrap().groups, [1001, 1234]);
        let merge = user_request(&sc(cri::SupplementalGroupsPolicy::Merge), &Default::default()).unwrap();
        assert_eq!(run(&merge).unwrap().groups, [10, 44, 1001, 1234]);
    }

    #[test]
    fn cve_2026_47262_giant_files_are_bounded() {
        let request = request("", "alice");
        let line = "x".repeat(LONGEST_LINE + 1) + "\nalice:x:7:7:::\n";
        let facts = RootfsFacts::scan(&request, Some(line.as_bytes()), None::<&[u8]>).unwrap();
        assert_eq!(facts.passwd.unwrap().uid, 7, "an overlong line is passed over");
        let endless = std::io::BufReader::new(std::io::repeat(b'a'));
        let e = RootfsFacts::scan(&request, Some(endless), None::<&[u8]>).unwrap_err();
        assert!(e.to_string().contains("larger than"), "{e}");
    }
}
