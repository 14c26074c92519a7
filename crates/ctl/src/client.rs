//! The typed client of the admin API: one method per operation.
//!
//! It sends each request once. A change carries an idempotency key, so that
//! the caller may send it again after an unclear outcome.

pub mod credentials;
pub mod link;

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use serde::Serialize;
use serde::de::DeserializeOwned;

use fleet_kms_admin_api::change::IDEMPOTENCY_KEY;
use fleet_kms_admin_api::operations::percent_encode;
use fleet_kms_admin_api::{AuditQuery, AuditRecord, Change, Operation, Page, PageQuery, Problem, Status};

use crate::progress::Progress;

use link::{Link, LinkError};

/// Items asked for on one page.
const PAGE: u32 = 500;

/// What a person reads while an answer takes long.
const WAITING: &str = "waiting for the agent";

/// The most items of a list that are collected: ten times the largest fleet.
const MAX_ITEMS: usize = 1_000_000;

/// Options of a change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChangeOptions {
    /// Why; stands in the audit record.
    pub reason: Option<String>,
    /// Say what would happen, and do nothing.
    pub dry_run: bool,
    /// Revision that the cluster must be at.
    pub if_revision: Option<u64>,
    /// The same for every attempt at one change.
    pub idempotency_key: String,
}

/// Why a call has no answer, or which problem it answered.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The agent could not be reached, or the connection broke.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The agent answered a problem.
    #[error("{}", .0.detail)]
    Problem(Box<Problem>),
    /// What was asked cannot be written as a request.
    #[error("the request cannot be written")]
    Request(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The answer is not one of the admin API's.
    #[error("the server answered {status}, but not as the admin API does")]
    Strange {
        /// HTTP status.
        status: StatusCode,
        /// What did not parse.
        source: serde_json::Error,
    },
    /// A list does not come to an end.
    #[error("the list has more than {MAX_ITEMS} items")]
    Endless,
}

/// A client of one agent's admin API.
pub struct Client {
    link: Link,
    timeout: Duration,
}

impl Client {
    /// Makes a client of an open link; `timeout` holds for each request.
    pub fn new(link: Link, timeout: Duration) -> Self {
        Self { link, timeout }
    }

    /// Asks for one thing.
    ///
    /// # Errors
    /// When there is no answer, or it is a problem.
    pub async fn read<T: DeserializeOwned>(
        &mut self,
        operation: Operation,
        path: &[&str],
    ) -> Result<T, ClientError> {
        let request = request(operation, path, &[]).body(Bytes::new());
        let _progress = Progress::begin(WAITING);
        self.send(request).await
    }

    /// Asks for the agent's view of the fleet.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn status(&mut self) -> Result<Status, ClientError> {
        self.read(Operation::ShowStatus, &[]).await
    }

    /// Asks for one page of a list; `filters` are further pairs of its query.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn page<T: DeserializeOwned>(
        &mut self,
        operation: Operation,
        path: &[&str],
        query: &PageQuery,
        filters: &[(&str, Option<&str>)],
    ) -> Result<Page<T>, ClientError> {
        let limit = query.limit.map(|limit| limit.to_string());
        let mut pairs = vec![("limit", limit.as_deref()), ("after", query.after.as_deref())];
        pairs.extend(filters);
        let request = request(operation, path, &pairs).body(Bytes::new());
        self.send(request).await
    }

    /// Asks for a whole list, page by page.
    ///
    /// # Errors
    /// As [`Self::read`], and when the list does not come to an end.
    pub async fn list<T: DeserializeOwned>(
        &mut self,
        operation: Operation,
        path: &[&str],
    ) -> Result<Vec<T>, ClientError> {
        self.list_where(operation, path, &[]).await
    }

    /// As [`Self::list`], with more of a query than paging.
    ///
    /// # Errors
    /// As [`Self::list`].
    pub async fn list_where<T: DeserializeOwned>(
        &mut self,
        operation: Operation,
        path: &[&str],
        filters: &[(&str, Option<&str>)],
    ) -> Result<Vec<T>, ClientError> {
        let mut items = Vec::new();
        let mut query = PageQuery { limit: Some(PAGE), after: None };
        let progress = Progress::begin(WAITING);
        loop {
            let page = self.page(operation, path, &query, filters).await?;
            items.extend(page.items);
            progress.items(items.len());
            if page.next.is_none() {
                return Ok(items);
            }
            if items.len() > MAX_ITEMS || page.next == query.after {
                return Err(ClientError::Endless);
            }
            query.after = page.next;
        }
    }

    /// Asks for one page of the audit's records.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn search_audit(&mut self, query: &AuditQuery) -> Result<Page<AuditRecord>, ClientError> {
        let limit = query.limit.map(|limit| limit.to_string());
        let (from, to) = (query.from.map(|time| time.to_string()), query.to.map(|time| time.to_string()));
        let pairs = [
            ("limit", limit.as_deref()),
            ("after", query.after.as_deref()),
            ("chain", query.chain.as_deref()),
            ("from", from.as_deref()),
            ("to", to.as_deref()),
            ("who", query.who.as_deref()),
            ("cluster", query.cluster.as_deref()),
            ("action", query.action.as_deref()),
            ("outcome", query.outcome.as_deref()),
        ];
        let request = request(Operation::SearchAudit, &[], &pairs).body(Bytes::new());
        self.send(request).await
    }

    /// Changes something.
    ///
    /// # Errors
    /// As [`Self::read`]. After [`ClientError::Link`] the change may have
    /// happened: the same options may be sent again.
    pub async fn change<T: DeserializeOwned>(
        &mut self,
        operation: Operation,
        path: &[&str],
        body: Option<&(impl Serialize + Sync)>,
        options: &ChangeOptions,
    ) -> Result<Change<T>, ClientError> {
        let pairs = [("reason", options.reason.as_deref()), ("dry_run", options.dry_run.then_some("true"))];
        let mut request = request(operation, path, &pairs);
        let key = HeaderValue::from_str(&options.idempotency_key);
        request = request.header(IDEMPOTENCY_KEY, key.map_err(|error| ClientError::Request(error.into()))?);
        if let Some(revision) = options.if_revision {
            request = request.header(header::IF_MATCH, format!("\"{revision}\""));
        }
        let bytes = match body {
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                serde_json::to_vec(body).map_err(|error| ClientError::Request(error.into()))?.into()
            }
            None => Bytes::new(),
        };
        let _progress = Progress::begin(WAITING);
        self.send(request.body(bytes)).await
    }

    async fn send<T: DeserializeOwned>(
        &mut self,
        request: Result<Request<Bytes>, http::Error>,
    ) -> Result<T, ClientError> {
        let request = request.map_err(|error| ClientError::Request(error.into()))?;
        read_answer(&self.link.exchange(request, self.timeout).await?)
    }
}

/// Reads a success as `T` and anything else as a problem.
fn read_answer<T: DeserializeOwned>(response: &Response<Bytes>) -> Result<T, ClientError> {
    let status = response.status();
    let strange = |source| ClientError::Strange { status, source };
    if status.is_success() {
        return serde_json::from_slice(response.body()).map_err(strange);
    }
    let mut problem: Problem = serde_json::from_slice(response.body()).map_err(strange)?;
    // Exit codes go by the status that was really answered.
    problem.status = status.as_u16();
    Err(ClientError::Problem(Box::new(problem)))
}

fn request(operation: Operation, path: &[&str], query: &[(&str, Option<&str>)]) -> http::request::Builder {
    let mut uri = operation.path_with(path);
    let mut separator = '?';
    for (name, value) in query {
        let Some(value) = value else { continue };
        uri.push(separator);
        uri.push_str(name);
        uri.push('=');
        percent_encode(value, &mut uri);
        separator = '&';
    }
    Request::builder().method(operation.method().as_str()).uri(uri).header(header::ACCEPT, "application/json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_cannot_break_out_of_the_query() {
        let pairs = [("reason", Some("a&dry_run=true #ü")), ("dry_run", None)];
        let request = request(Operation::RotateKey, &["c"], &pairs).body(()).unwrap();
        let expected = "/v1/clusters/c/rotate?reason=a%26dry_run%3Dtrue%20%23%C3%BC";
        assert_eq!(request.uri().to_string(), expected);
        assert_eq!(request.method(), "POST");
    }

    #[test]
    fn a_page_of_a_proxy_is_strange_and_not_a_crash() {
        let response = Response::builder().status(502).body(Bytes::from("<html>")).unwrap();
        let error = read_answer::<Status>(&response).unwrap_err();
        assert!(matches!(error, ClientError::Strange { status: StatusCode::BAD_GATEWAY, .. }));
    }
}
