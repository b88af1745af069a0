//! The one place where the S3 client's errors become the port's.

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};

use super::super::ArtifactError;

/// What a request was about.
#[derive(Clone, Copy)]
pub(super) enum Subject<'a> {
    Bucket,
    Object(&'a str),
}

/// Sorts an error by what can be done about it. `bucket` is named where it is to blame.
pub(super) fn failed<E>(error: SdkError<E, HttpResponse>, subject: Subject<'_>, bucket: &str) -> ArtifactError
where
    E: std::error::Error + ProvideErrorMetadata + Send + Sync + 'static,
{
    let status = error.raw_response().map(|response| response.status().as_u16());
    let code = error.code().unwrap_or_default().to_owned();
    let told = DisplayErrorContext(&error).to_string();
    match &error {
        SdkError::ServiceError(_) => sort(status.unwrap_or(0), &code, told, subject, bucket),
        // A server that answers, but not as S3 does, may be a proxy that has lost its server.
        SdkError::TimeoutError(_) | SdkError::DispatchFailure(_) | SdkError::ResponseError(_) => {
            ArtifactError::Unavailable(told.into())
        }
        _ => ArtifactError::Internal(told.into()),
    }
}

/// Codes as in the S3 API's list of error responses, MinIO's and Ceph's; the status where there is none (the answer
/// to a HEAD has no body).
fn sort(status: u16, code: &str, told: String, subject: Subject<'_>, bucket: &str) -> ArtifactError {
    match (code, status, subject) {
        ("XMinioStorageFull" | "XMinioAdminBucketQuotaExceeded" | "QuotaExceeded" | "InsufficientStorage", ..)
        | (_, 507, _) => ArtifactError::Full(told.into()),
        ("NoSuchBucket", ..) | (_, 404, Subject::Bucket) => {
            ArtifactError::Internal(format!("there is no bucket `{bucket}`; make it first ({told})").into())
        }
        ("NoSuchKey", _, Subject::Object(path)) | (_, 404, Subject::Object(path)) => {
            ArtifactError::NotFound(path.to_owned())
        }
        ("RequestTimeTooSkewed", ..) => {
            ArtifactError::Internal(format!("this machine's clock is wrong: {told}").into())
        }
        ("PermanentRedirect" | "AuthorizationHeaderMalformed", ..) | (_, 301, _) => ArtifactError::Internal(
            format!("`region` under [artifacts] may be wrong for bucket `{bucket}`: {told}").into(),
        ),
        ("RequestTimeout" | "SlowDown" | "Throttling" | "ServiceUnavailable" | "InternalError", ..)
        | (_, 408 | 429 | 500.., _) => ArtifactError::Unavailable(told.into()),
        (_, 401 | 403, _) => {
            let message = format!("the server refuses this access key, or refuses it bucket `{bucket}`: {told}");
            ArtifactError::Internal(message.into())
        }
        _ => ArtifactError::Internal(told.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(status: u16, code: &str, subject: Subject<'_>) -> ArtifactError {
        sort(status, code, "what the server said".into(), subject, "renders")
    }

    #[test]
    fn no_room_is_full_whoever_says_it_and_however() {
        for (status, code) in [(507, ""), (507, "XMinioStorageFull"), (403, "QuotaExceeded")] {
            assert!(matches!(sorted(status, code, Subject::Object("a")), ArtifactError::Full(_)), "{status} {code}");
        }
    }

    #[test]
    fn a_missing_object_is_named_and_a_missing_bucket_is_another_matter() {
        assert!(
            matches!(sorted(404, "NoSuchKey", Subject::Object("a/b")), ArtifactError::NotFound(path) if path == "a/b")
        );
        assert!(matches!(sorted(404, "", Subject::Object("a/b")), ArtifactError::NotFound(_)));
        for error in [sorted(404, "NoSuchBucket", Subject::Object("a")), sorted(404, "", Subject::Bucket)] {
            assert!(matches!(&error, ArtifactError::Internal(_)) && error.to_string().contains("`renders`"), "{error}");
        }
    }

    #[test]
    fn what_time_may_mend_is_unavailable() {
        for (status, code) in [(503, "SlowDown"), (500, "InternalError"), (502, ""), (429, ""), (400, "RequestTimeout")]
        {
            let error = sorted(status, code, Subject::Bucket);
            assert!(matches!(error, ArtifactError::Unavailable(_)), "{status} {code}");
        }
    }

    #[test]
    fn refused_keys_wrong_regions_and_wrong_clocks_say_what_to_look_at() {
        for (status, code, word) in [
            (403, "InvalidAccessKeyId", "access key"),
            (403, "SignatureDoesNotMatch", "access key"),
            (403, "", "access key"),
            (301, "PermanentRedirect", "region"),
            (400, "AuthorizationHeaderMalformed", "region"),
            (403, "RequestTimeTooSkewed", "clock"),
        ] {
            let error = sorted(status, code, Subject::Bucket);
            assert!(matches!(&error, ArtifactError::Internal(_)) && error.to_string().contains(word), "{error}");
        }
    }
}
