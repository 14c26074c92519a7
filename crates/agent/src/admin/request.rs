//! Requests, parsed at the edge: names in the path, paging, options of a
//! change, bodies. What does not parse is a problem, never a panic.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use fleet_kms_admin_api::change::MAX_REASON;
use fleet_kms_admin_api::paging::{DEFAULT_LIMIT, MAX_CURSOR, MAX_LIMIT};
use fleet_kms_admin_api::{ChangeQuery, Code, Operation, PageQuery};
use fleet_kms_keyring::Version;
use fleet_kms_store::Revision;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use crate::admin::refusal::{Refused, no_cluster, no_version};
use crate::admin::{Admin, BODY_WITHIN};
use crate::agent::Agent;
use crate::authz::{Action, Denied, FleetPermit, Permit};
use crate::caller::Caller;
use crate::clusters::LiveClusterName;
use crate::control_plane::{ClusterChangeError, Wish};

/// Who asks, and of which agent.
pub(super) struct Call {
    pub(super) admin: Admin,
    pub(super) caller: Caller,
}

impl Call {
    pub(super) fn agent(&self) -> &Agent {
        &self.admin.agent
    }

    /// Finds a cluster by name or id and the permit to do `A` to it.
    ///
    /// Whoever may do `A` nowhere learns nothing about names.
    pub(super) fn on<A: Action>(&self, cluster: &str) -> Result<(LiveClusterName, Permit<A>), Refused> {
        let role = self.fleet::<A>()?;
        let cluster = self.agent().clusters.find(cluster).ok_or_else(|| nowhere(&role))?;
        let permit = self.agent().policy.permit_on(&self.caller, cluster.id)?;
        Ok((cluster, permit))
    }

    /// As [`Self::on`], for what makes no sense on a retired cluster.
    pub(super) fn on_live<A: Action>(&self, cluster: &str) -> Result<(LiveClusterName, Permit<A>), Refused> {
        let (cluster, permit) = self.on(cluster)?;
        match cluster.retired {
            None => Ok((cluster, permit)),
            Some(_) => Err(ClusterChangeError::Retired.into()),
        }
    }

    /// As [`Self::on`], for a retired cluster, by its id or the name it had.
    pub(super) fn on_retired<A: Action>(
        &self,
        cluster: &str,
    ) -> Result<(LiveClusterName, Permit<A>), Refused> {
        let role = self.fleet::<A>()?;
        let mut found = self.agent().clusters.find_retired(cluster);
        found.retain(|cluster| role.sees(&cluster.id));
        match (found.pop(), found.is_empty()) {
            (Some(one), true) => {
                let permit = self.agent().policy.permit_on(&self.caller, one.id)?;
                Ok((one, permit))
            }
            (Some(_), false) => {
                let remedy = "give the cluster's id: `kmsctl cluster list --retired -o wide` shows it";
                Err(Refused::new(Code::StateConflict, "several retired clusters had this name", remedy))
            }
            // There is no retired one; a live one is no secret to who may see it.
            (None, _) => {
                let _live = self.on::<A>(cluster)?;
                Err(ClusterChangeError::Live.into())
            }
        }
    }

    /// Gets the permit to do `A`, which concerns no single cluster.
    pub(super) fn fleet<A: Action>(&self) -> Result<FleetPermit<A>, Refused> {
        Ok(self.agent().policy.permit_fleet(&self.caller)?)
    }
}

impl FromRequestParts<Admin> for Call {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, admin: &Admin) -> Result<Self, Refused> {
        let caller = parts.extensions.get::<Caller>().cloned().ok_or(Denied::NoCertificate)?;
        Ok(Self { admin: admin.clone(), caller })
    }
}

/// Whoever sees some clusters only cannot tell one that is hidden from none.
fn nowhere<A: Action>(role: &FleetPermit<A>) -> Refused {
    if role.sees_all() { no_cluster() } else { Denied::Scope.into() }
}

/// The names in the path, in order.
pub(super) struct Names<T>(pub(super) T);

impl<T: DeserializeOwned + Send> FromRequestParts<Admin> for Names<T> {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, admin: &Admin) -> Result<Self, Refused> {
        match Path::from_request_parts(parts, admin).await {
            Ok(Path(names)) => Ok(Self(names)),
            Err(error) => Err(unreadable(&error.body_text())),
        }
    }
}

/// Reads a version number; what is none is refused, what cannot exist is not found.
pub(super) fn version(text: &str) -> Result<Version, Refused> {
    match text.parse::<u32>() {
        Ok(number) => Version::new(number).ok_or_else(no_version),
        Err(_) => Err(unreadable("a version is a number from 1 to 4294967295")),
    }
}

/// Which part of a list is wanted.
pub(super) struct Paging {
    pub(super) limit: usize,
    pub(super) after: Option<String>,
}

impl FromRequestParts<Admin> for Paging {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, _: &Admin) -> Result<Self, Refused> {
        let query = Query::<PageQuery>::try_from_uri(&parts.uri);
        let Query(PageQuery { limit, after }) = query.map_err(|error| unreadable(&error.body_text()))?;
        paging(limit, after)
    }
}

/// Parses which part of a list is wanted.
pub(super) fn paging(limit: Option<u32>, after: Option<String>) -> Result<Paging, Refused> {
    let limit = limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(Refused::field("limit", format!("a page of {limit} items"), "ask for 1 to 1,000 items"));
    }
    if after.as_ref().is_some_and(|after| !(1..=MAX_CURSOR).contains(&after.len())) {
        return Err(Refused::field("after", "this is no cursor", "use the `next` of the page before"));
    }
    Ok(Paging { limit: limit as usize, after })
}

/// The query of a list that takes more than paging.
pub(super) struct Asked<Q>(pub(super) Q);

impl<Q: DeserializeOwned> FromRequestParts<Admin> for Asked<Q> {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, _: &Admin) -> Result<Self, Refused> {
        let query = Query::<Q>::try_from_uri(&parts.uri);
        let Query(query) = query.map_err(|error| unreadable(&error.body_text()))?;
        Ok(Self(query))
    }
}

/// The options of a change.
pub(super) struct Options {
    pub(super) dry_run: bool,
    reason: Option<String>,
    if_revision: Option<Revision>,
}

impl Options {
    /// What goes along with the change to the control plane.
    pub(super) fn wish(&self) -> Wish<'_> {
        Wish { reason: self.reason.as_deref(), at: self.if_revision }
    }
}

impl FromRequestParts<Admin> for Options {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, _: &Admin) -> Result<Self, Refused> {
        let query = Query::<ChangeQuery>::try_from_uri(&parts.uri);
        let Query(ChangeQuery { reason, dry_run }) = query.map_err(|error| unreadable(&error.body_text()))?;
        if reason
            .as_ref()
            .is_some_and(|reason| reason.len() > MAX_REASON || reason.contains(char::is_control))
        {
            let remedy = "use at most 512 bytes and no control characters";
            return Err(Refused::field("reason", "the reason is too long or no plain text", remedy));
        }
        let if_revision = if_match(&parts.headers)?;
        if if_revision.is_some() && !has_revision(parts) {
            let remedy = "leave out If-Match";
            return Err(Refused::new(Code::InvalidRequest, "this change has nothing at a revision", remedy));
        }
        Ok(Self { dry_run, reason, if_revision })
    }
}

/// A condition that nobody would look at is refused, never taken as met.
fn has_revision(parts: &Parts) -> bool {
    parts.extensions.get::<Operation>().is_some_and(|operation| operation.has_revision())
}

fn if_match(headers: &HeaderMap) -> Result<Option<Revision>, Refused> {
    let Some(value) = headers.get(header::IF_MATCH) else { return Ok(None) };
    let text = value.to_str().ok().and_then(|text| text.strip_prefix('"')?.strip_suffix('"'));
    let number = text.filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    match number.and_then(|number| number.parse().ok()) {
        Some(revision) => Ok(Some(Revision(revision))),
        None => {
            let remedy = "send the revision that you saw in quotes, like \"17\"";
            Err(Refused::new(Code::InvalidRequest, "If-Match is no revision", remedy))
        }
    }
}

/// A JSON body that must come.
pub(super) struct Body<T>(pub(super) T);

/// A JSON body that may be left out.
pub(super) struct OptionalBody<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Admin> for Body<T> {
    type Rejection = Refused;

    async fn from_request(request: Request, admin: &Admin) -> Result<Self, Refused> {
        let (headers, bytes) = read(request, admin).await?;
        parse(&headers, &bytes).map(Self)
    }
}

impl<T: DeserializeOwned + Default> FromRequest<Admin> for OptionalBody<T> {
    type Rejection = Refused;

    async fn from_request(request: Request, admin: &Admin) -> Result<Self, Refused> {
        let (headers, bytes) = read(request, admin).await?;
        if bytes.is_empty() {
            return Ok(Self(T::default()));
        }
        parse(&headers, &bytes).map(Self)
    }
}

async fn read(request: Request, admin: &Admin) -> Result<(HeaderMap, Bytes), Refused> {
    let headers = request.headers().clone();
    let bytes = timeout(BODY_WITHIN, Bytes::from_request(request, admin)).await;
    let bytes = bytes.map_err(|_| unreadable("the body did not come within 10 seconds"))?;
    let bytes = bytes.map_err(|error: BytesRejection| match error.status().as_u16() {
        413 => Refused::new(Code::BodyTooLarge, "the body is longer than 64 KiB", "send less"),
        _ => unreadable("the body broke off"),
    })?;
    Ok((headers, bytes))
}

fn parse<T: DeserializeOwned>(headers: &HeaderMap, bytes: &Bytes) -> Result<T, Refused> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        let remedy = "send JSON with content-type: application/json";
        return Err(Refused::new(Code::UnsupportedMediaType, "the body is not said to be JSON", remedy));
    }
    // serde takes an array for the fields in their order; the document does not.
    if bytes.trim_ascii_start().first().is_some_and(|first| *first != b'{') {
        return Err(unreadable("the body is no JSON object"));
    }
    serde_json::from_slice(bytes).map_err(|error| unreadable(&error.to_string()))
}

pub(super) fn unreadable(why: &str) -> Refused {
    Refused::new(Code::InvalidRequest, why, "compare the request with /openapi.json")
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use fleet_kms_admin_api::{CreateCluster, CreateToken};

    use super::*;

    fn headers(name: header::HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    #[test]
    fn only_a_quoted_number_is_a_revision() {
        assert_eq!(if_match(&HeaderMap::new()).unwrap(), None);
        assert_eq!(if_match(&headers(header::IF_MATCH, "\"17\"")).unwrap(), Some(Revision(17)));
        for bad in ["17", "*", "W/\"17\"", "\"+17\"", "\"\"", "\"99999999999999999999\""] {
            assert!(if_match(&headers(header::IF_MATCH, bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_body_must_be_json_without_unknown_fields() {
        let json = headers(header::CONTENT_TYPE, "application/json; charset=utf-8");
        assert!(parse::<CreateCluster>(&json, &Bytes::from(r#"{"name":"a"}"#)).is_ok());
        for body in ["", "{", r#"{"name":"a","x":1}"#, "[]", r#"{"name":1}"#] {
            assert!(parse::<CreateCluster>(&json, &Bytes::from(body)).is_err(), "{body}");
        }
        assert!(parse::<CreateToken>(&json, &Bytes::from(" {}")).is_ok());
        assert!(parse::<CreateToken>(&json, &Bytes::from("[null]")).is_err());
        let form = headers(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
        assert!(parse::<CreateCluster>(&form, &Bytes::from(r#"{"name":"a"}"#)).is_err());
    }

    #[test]
    fn a_version_that_cannot_exist_is_not_found_and_a_word_is_no_version() {
        assert_eq!(version("7").unwrap(), Version::new(7).unwrap());
        for bad in ["0", "-1", "x", "4294967296"] {
            assert!(version(bad).is_err(), "{bad}");
        }
    }
}
